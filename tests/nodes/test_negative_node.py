"""The node NASANegativeAttention: what it chooses, what it says, and what it refuses."""

import math

import pytest
import torch
from negative_proof import draw

pytestmark = pytest.mark.comfy


def run(model, negative, **widgets):
    from stylewright.nodes.negative import NASANegativeAttention

    node = NASANegativeAttention.PREPARE_CLASS_CLONE(None)
    with torch.inference_mode():
        return node.execute(model, negative, **widgets).result


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("sd15", "nasa, scale 0.1 (arXiv 2412.02687v3"),
        ("sd21", "nasa, scale 0.2 (arXiv 2412.02687v3"),
        ("pixart", "nasa, scale 0.5 (arXiv 2412.02687v3"),
        ("sdxl", "nag, scale 2, tau 2.5, blend 0.5 (arXiv 2505.21179, Table 5"),
        ("wan21", "nag, scale 4, tau 2.5, blend 0.25 (arXiv 2505.21179, Table 5"),
        ("ltxv", "nag, scale 4, tau 2.5, blend 0.25 (FLUX's, arXiv 2505.21179, Table 5; none is published"),
    ],
)
def test_it_chooses_by_family_and_says_so(family, said, tiny, tiny_prompt):
    model, positive = tiny(family), tiny_prompt(family, 5, 1)
    patched, info = run(model, tiny_prompt(family, 7, 2))
    assert info.startswith(said)
    assert not torch.equal(draw(patched, family, positive), draw(model, family, positive))


def test_what_the_user_states_stands(tiny, tiny_prompt):
    model, negative = tiny("sdxl"), tiny_prompt("sdxl", 7, 2)
    _, info = run(model, negative, method="vsf", scale=0.6, layers="0-1, 3", window="from window_low to window_high",
                  window_high=-2.0)  # fmt: skip
    assert info == "vsf, scale 0.6 (stated); acts at log_snr from -5.364 below -2; in layers 0, 1, 3"
    assert run(model, [*negative, *negative], blend=0.1)[1].endswith("2 negative prompts, averaged")
    nothing = [[torch.zeros(1, 7, 16), {}]]
    assert run(model, nothing)[1] == "the negative prompt is empty: nothing changes"
    assert run(model, negative, scale=0.0)[1] == "the scale is 0: nothing changes"


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"scale": -0.5}, "the scale is -0.5: expected a number of 0 or more"),
        ({"scale": math.nan}, "the scale is nan"),
        ({"scale": math.inf}, "the scale is inf"),
        ({"tau": 0.0, "method": "nag"}, "tau is 0: expected a number above 0"),
        ({"blend": -0.5, "method": "nag"}, "blend is -0.5: expected a number from 0 to 1"),
        ({"layers": "two"}, "layers: 'two' is no number"),
        ({"layers": "7-3"}, "layers: '7-3' is no number"),
        ({"layers": "2, 99"}, "has 8 attentions to text, 0 to 7: layer 99 is not one"),
        ({"window": "from window_low to window_high", "window_low": 1.0, "window_high": -1.0}, "smaller number first"),
    ],
)
def test_bad_widgets(widgets, message, tiny, tiny_prompt):
    with pytest.raises(ValueError, match=message):
        run(tiny("sdxl"), tiny_prompt("sdxl", 7, 2), **widgets)


def test_bad_negatives(tiny, tiny_prompt):
    from stylewright.nodes.bridge.negative import Unsupported

    model, (negative,), positive = tiny("sdxl"), tiny_prompt("sdxl", 7, 2), tiny_prompt("sdxl", 5, 1)
    with pytest.raises(ValueError, match="entry 1 of the negative conditioning contains NaN or infinity"):
        run(model, [[torch.full_like(negative[0], math.nan), {}]])
    with pytest.raises(ValueError, match="has no encoded text"):
        run(model, [[None, {}]])
    with pytest.raises(ValueError, match=r"entry 2 .* carries what attention cannot follow \(Conditioning \(Set Mask"):
        run(model, [negative, [negative[0], {"mask": torch.ones(1, 8, 8)}]])
    with pytest.raises(ValueError, match="negative prompt is encoded 24 wide, this model takes 16: encode the prompt"):
        run(model, [[torch.ones(1, 7, 24), negative[1]]])
    adapted = model.clone()  # by a node that may translate what another text encoder says, and does not
    adapted.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    with pytest.raises(ValueError, match="negative prompt is encoded 24 wide and the positive one 16: encode both"):
        draw(run(adapted, [[torch.ones(1, 7, 24), negative[1]]])[0], "sdxl", positive)
    with pytest.raises(Unsupported, match="HunYuanDiT: no hook of ComfyUI reaches this model's attention to text"):
        run(tiny("hunyuan-dit"), tiny_prompt("hunyuan-dit", 7, 2))
