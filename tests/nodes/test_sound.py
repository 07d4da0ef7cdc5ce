"""Whether a prompt is one that a model can take: widths of every family, and models that take others on purpose."""

import pytest
import torch
from tiny_models import TINY, is_known

pytestmark = pytest.mark.comfy

UNKNOWN = (  # families whose text's width is not told by a layer that is known
    "hidream", "hidream-o1", "hunyuan-dit", "hunyuan-dit1", "omnigen2", "boogu", "krea2", "kandinsky5",
    "kandinsky5-image", "ernie-image", "ideogram4", "joyimage", "pixeldit", "mochi", "cogvideox", "cogvideox15",
)  # fmt: skip
POOLED = ("sdxl", "sdxl-refiner", "sd3", "flux", "hunyuan-video")


@pytest.fixture(params=TINY)
def family(request):
    if not is_known(request.param):
        pytest.skip("this ComfyUI does not have it")
    return request.param


def check(model, conditioning):
    from stylewright.nodes.bridge.sound import check_fits

    check_fits(model, {"second": conditioning})


def test_a_prompt_of_its_own_passes(family, tiny, tiny_prompt):
    check(tiny(family), tiny_prompt(family, 5))


def test_one_of_another_text_encoder_is_named(family, tiny, tiny_prompt):
    """With both widths, and what to do."""
    model, ((text, values),), width = tiny(family), tiny_prompt(family, 5), TINY[family].width
    wider = [[torch.cat([text, text], -1), values]]
    if family in UNKNOWN:
        return check(model, wider)
    with pytest.raises(ValueError, match=f"second is encoded {2 * width} wide, this model takes {width}: encode the p"):
        check(model, wider)


@pytest.mark.parametrize("family", POOLED)
def test_a_pooled_output_of_another(family, tiny, tiny_prompt):
    model, ((text, values),), width = tiny(family), tiny_prompt(family, 5), TINY[family].pooled
    with pytest.raises(ValueError, match=f"second is encoded 7 wide in its pooled output, this model takes {width}"):
        check(model, [[text, {**values, "pooled_output": torch.ones(1, 7)}]])


def test_models_that_another_node_works_on_are_left_to_it(tiny, tiny_prompt):
    """A wrapper, or a network of another pack's, may translate what another text encoder says."""
    from comfy.patcher_extension import WrappersMP

    wrong = tiny_prompt("flux", 5)
    wrapped, patched, replaced = (tiny("sdxl").clone() for _ in range(3))
    wrapped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "another", lambda executor, *args: executor(*args))
    patched.add_object_patch("diffusion_model.forward", patched.get_model_object("diffusion_model.forward"))
    replaced.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"])
    )
    for model in (wrapped, patched, replaced):
        check(model, wrong)
    with pytest.raises(ValueError, match="is encoded 32 wide, this model takes 16"):
        check(tiny("sdxl"), wrong)
