"""Negative prompts and nodes that replace a layer of the model later: those that ask what was there, and those not."""

import pytest
import torch
from negative_proof import CROSS, draw, guidance, sigmas_of
from tiny_models import is_known

pytestmark = pytest.mark.comfy

# What attends to text, or makes the text ready for that, and holds the negative tokens there.
LAYERS = {
    "sdxl": "middle_block.1.transformer_blocks.0", "pixart": "blocks.1.cross_attn", "wan21": "blocks.1.cross_attn",
    "cosmos": "blocks.block1.blocks.1.block.attn", "cosmos-predict2": "blocks.1.cross_attn",
    "ltxv": "transformer_blocks.1.attn2", "flux": "double_blocks.1", "chroma": "single_blocks.1",
    "sd3": "joint_blocks.1", "qwen": "transformer_blocks.1", "hidream": "single_stream_blocks.0",
    "hunyuan-video": "txt_in", "lumina2": "context_refiner.0", "z-image": "layers.1", "auraflow": "cond_seq_linear",
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def family(request):
    if not is_known(request.param):
        pytest.skip("this ComfyUI does not have it")
    return request.param


def apply(*args, **kwargs):
    from stylewright.nodes.bridge.negative import apply

    return apply(*args, **kwargs)


def test_a_later_replacement_that_chains_passes(family, tiny, tiny_prompt):
    """With the same answer, and the layer is counted as before."""
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    patched, calls = apply(model, negative, guidance("nag")), []
    expected, later = draw(patched, family, positive), patched.clone()
    path = f"diffusion_model.{LAYERS[family]}.forward"
    before = later.get_model_object(path)

    def chained(*args, **kwargs):
        calls.append(args)
        return before(*args, **kwargs)

    later.add_object_patch(path, chained)
    assert torch.equal(draw(later, family, positive), expected)
    assert calls


def test_a_later_replacement_that_does_not_is_named(family, tiny, tiny_prompt):
    """Also on a model that was drawn with before; and the model is as before afterwards."""
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    name, patched = LAYERS[family], apply(model, negative, guidance("nag"))
    later, other, base = patched.clone(), alone(model, name), draw(model, family, positive)
    expected = draw(patched, family, positive)
    later.add_object_patch(f"diffusion_model.{name}.forward", other)
    with pytest.raises(
        ValueError, match=rf"another node has replaced {name}.*Put the negative prompt behind that node"
    ):
        draw(later, family, positive)
    assert torch.equal(draw(patched, family, positive), expected)
    assert torch.equal(draw(model, family, positive), base)


def alone(model, name):
    """The work of a layer by another pack, which has copied it: of ComfyUI's own attention, and of no options."""
    from copy import deepcopy

    layer = deepcopy(model.model.diffusion_model.get_submodule(name))

    def forward(*args, **kwargs):
        options = kwargs.get("transformer_options")
        if options is not None:
            kept = ("block", "block_index", "block_type", "cond_or_uncond", "sigmas")
            kwargs["transformer_options"] = {key: options[key] for key in kept if key in options}
        return layer(*args, **kwargs)

    return forward


@pytest.mark.parametrize("family", ["wan21", "cosmos-predict2", "ltxv"])
def test_an_earlier_one_that_does_not_pass_on_what_it_is_told(family, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    earlier, name = model.clone(), LAYERS[family]
    earlier.add_object_patch(f"diffusion_model.{name}.forward", alone(model, name))
    with pytest.raises(ValueError, match=f"another node has replaced {name}"):
        draw(apply(earlier, negative, guidance("nag")), family, positive)


@pytest.mark.parametrize("chains", [True, False])
@pytest.mark.parametrize(
    ("family", "block"),
    [
        ("flux", ("double_block", 1)),
        ("wan21", ("double_block", 0)),
        ("qwen", ("double_block", 1)),
        ("hunyuan-video", ("single_block", 0)),
    ],
)
def test_replaced_blocks(family, block, chains, tiny, tiny_prompt):
    """As image adapters for FLUX replace them."""
    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    patched = apply(model, negative, guidance("nag"))
    expected, later = draw(patched, family, positive), patched.clone()

    def replacement(args, extra):
        return (
            extra["original_block"](args) if chains else {name: args[name] for name in ("img", "txt") if name in args}
        )

    later.set_model_patch_replace(replacement, "dit", *block)
    if chains:
        assert torch.equal(draw(later, family, positive), expected)
        return
    with pytest.raises(ValueError, match=r"another node has replaced \w*blocks"):
        draw(later, family, positive)


def test_an_override_of_attention_within_the_call(tiny, tiny_prompt):
    """A wrapper that runs inside of ours and puts its own override there."""
    from comfy.patcher_extension import WrappersMP

    model, positive, negative = tiny("flux"), tiny_prompt("flux", 5, 1), tiny_prompt("flux", 7, 2)
    later = apply(model, negative, guidance("nag")).clone()

    def wrapper(executor, *args, **kwargs):
        *args, options = args
        own = {**options, "optimized_attention_override": lambda function, *given, **named: function(*given, **named)}
        return executor(*args, own, **kwargs)

    later.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "another", wrapper)
    with pytest.raises(ValueError, match=r"another node has replaced double_blocks\.0 and \d more layers"):
        draw(later, "flux", positive)


@pytest.mark.parametrize("family", ["sdxl", "wan21", "flux"])
def test_calls_that_another_node_answers_later_are_no_error(family, tiny, tiny_prompt):
    """A cache of whole calls, even where the negative prompt begins after it has begun to answer."""
    from comfy.patcher_extension import WrappersMP

    from stylewright.nodes.bridge.noise_levels import noise_levels
    from stylewright.training.windows import Window

    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    sigmas, kept = sigmas_of(model), {}
    late = Window(low=float(noise_levels(model).log_snr(torch.tensor(sigmas[1]))))
    patched = apply(model, negative, guidance("nag"), late)
    base, alone = draw(model, family, positive, sigmas=sigmas), draw(patched, family, positive, sigmas=sigmas)

    def cached(executor, x, *args, **kwargs):
        kept["calls"] = kept.get("calls", 0) + 1
        if kept["calls"] == 2:
            return kept["answer"]
        kept["answer"] = executor(x, *args, **kwargs)
        return kept["answer"]

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another", cached)
    found = draw(patched, family, positive, sigmas=sigmas)
    assert kept["calls"] == 3 and not torch.equal(found, alone) and not torch.equal(found, base)


def test_a_cache_that_answers_all_of_the_window(tiny, tiny_prompt):
    """Then the negative prompt has done nothing, and the user is told so."""
    from comfy.patcher_extension import WrappersMP

    from stylewright.nodes.bridge.noise_levels import noise_levels
    from stylewright.training.windows import Window

    model, positive, negative = tiny("sdxl"), tiny_prompt("sdxl", 5, 1), tiny_prompt("sdxl", 7, 2)
    sigmas, kept = sigmas_of(model), []
    late = Window(low=float(noise_levels(model).log_snr(torch.tensor(sigmas[1]))))
    patched = apply(model, negative, guidance("nag"), late)

    def cached(executor, *args, **kwargs):
        kept.append(kept[0] if kept else executor(*args, **kwargs))
        return kept[0]

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another", cached)
    with pytest.raises(ValueError, match="another node has replaced"):
        draw(patched, "sdxl", positive, sigmas=sigmas)


@pytest.mark.parametrize("family", ["sd3"])
def test_layers_that_another_node_skips_in_calls_of_its_own(family, tiny, tiny_prompt):
    """ComfyUI's SkipLayerGuidanceSD3 asks the positive prompt once more, without some blocks."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    patched = apply(model, negative, guidance("nag"))
    plain = draw(patched, family, positive, negative=tiny_prompt(family, 5, 3), cfg=2.0)
    (skipping,) = SkipLayerGuidanceDiT.execute(patched, 3.0, 0.0, 1.0, "1", "1").result
    found = draw(skipping, family, positive, negative=tiny_prompt(family, 5, 3), cfg=2.0)
    assert bool(found.isfinite().all()) and not torch.equal(found, plain)


def test_every_layer_of_cross_attention_is_known(tiny, tiny_prompt):
    """By the path of its module, which errors name."""
    from negative_proof import layers_of

    for family in CROSS:
        model = tiny(family)
        patched = apply(model, tiny_prompt(family, 7, 2), guidance("nag"))
        gate = patched.wrappers["apply_model"][next(iter(patched.wrappers["apply_model"]))][0].__self__
        found = [model.model.diffusion_model.get_submodule(layer.path) for layer in gate._reached]
        assert {id(each) for each in found} == {id(each) for each in layers_of(model, family)}
