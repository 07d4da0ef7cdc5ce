"""The guider beside other adapters and nodes, what is left of it afterwards, and what it refuses."""

import importlib.util
import sys
from pathlib import Path

import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from tiny_models import tiny_model

from stylewright.training.guidance import RULES

pytestmark = pytest.mark.comfy

spec = importlib.util.spec_from_file_location("guider_proof", Path(__file__).with_name("guider_proof.py"))
proof = sys.modules["guider_proof"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(proof)
LAYERS, apply, lora_of, stock = proof.LAYERS, proof.apply, proof.lora_of, proof.stock
by_hand, draw, node = proof.by_hand, proof.draw, proof.node
window, adapters = proof.windows_proof.window, proof.windows_proof.adapters

RULE = ("FineStyle", 0.7, 2.5)
WEIGHTS = RULES["FineStyle"](0.7, 2.5).weights


@pytest.fixture
def at(latent_channels, tiny_prompt):
    """The noise and the prompts of a family."""
    return lambda family: proof.Sampler(family, tiny_prompt, latent_channels)


def guided(model, base, sampler, rule=RULE, **options):
    guider, _ = node(rule, model, base, sampler.positive, sampler.negative)
    return draw(guider, sampler, **options)


def near(found, expected, unlike, tolerance=2e-5):
    """Equal to within float32's rounding; ``unlike`` is what it would be without what is proved."""
    assert (expected - unlike).abs().max() > 20 * tolerance * expected.abs().max(), "it has to be seen"
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def both(make, family="flux"):
    """``make(model)`` gives adapted and base: of one model, and each of a model of its own."""
    one = tiny_model(family)
    return make(one), (make(tiny_model(family))[0], make(tiny_model(family))[1])


def loras(family="flux"):
    model = tiny_model(family)
    return lora_of(model, LAYERS[family][:3]), lora_of(model, LAYERS[family][1:], rank=2)


# --------------------------------------------------------------------------------------------------------------------
# Other adapters


STACKS = {
    "one before both": lambda model, x, y: (stock(stock(model, x), y, 0.6), "x"),
    "one after": lambda model, x, y: (stock(stock(model, y, 0.6), x), None),
    "windowed": lambda model, x, y: (apply(apply(model, x), y, 0.6, window(high=-2.0)), None),
    "windowed on patched base": lambda model, x, y: (apply(stock(model, x), y, 0.6, window()), "x"),
    "bypass": lambda model, x, y: (bypass(stock(model, x), y), "x"),
}


def bypass(model, lora):
    """By ComfyUI's loader that wraps layers instead of patching weights."""
    with torch.inference_mode():
        return comfy.sd.load_bypass_lora_for_models(model, None, lora, 0.6, 0.0)[0]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_adapters_of_every_loader(stack, family, at):
    first, second = loras(family)

    def make(model):
        before = stock(model, first)  # of one node, which both get
        if "both" in stack or "patched base" in stack or "bypass" in stack:
            return {"one before both": stock, "bypass": bypass}.get(stack, windowed)(before, second), before
        return STACKS[stack](model, first, second)[0], model

    (adapted, base), (own_adapted, own_base) = both(make, family)
    found, expected = guided(adapted, base, at(family)), by_hand(own_adapted, own_base, WEIGHTS, at(family))
    near(found, expected, by_hand(own_adapted, own_adapted, WEIGHTS, at(family)))
    assert torch.equal(guided(adapted, base, at(family)), found)


def windowed(model, lora):
    return apply(model, lora, 0.6, window())


def test_an_adapter_that_both_load_in_nodes_of_their_own_is_taken_apart_on_both_sides(at):
    first, second = loras()

    def make(model):
        return stock(stock(model, second, 0.6), first), stock(model, dict(first))

    (adapted, base), (own_adapted, own_base) = both(make)
    found, expected = guided(adapted, base, at("flux")), by_hand(own_adapted, own_base, WEIGHTS, at("flux"))
    near(found, expected, by_hand(own_adapted, tiny_model("flux"), WEIGHTS, at("flux")))


def test_adapters_that_only_the_base_has(at):
    """A window, or a bypass, in the base alone."""
    first, second = loras()
    for loader in (windowed, bypass):
        (adapted, base), own = both(lambda model, load=loader: (stock(model, first), load(model, second)))
        found, expected = guided(adapted, base, at("flux")), by_hand(*own, WEIGHTS, at("flux"))
        near(found, expected, by_hand(own[0], tiny_model("flux"), WEIGHTS, at("flux")))


def test_style_inject(at, tmp_path):
    """Which reads what the patches before it have made of a layer's output."""
    spec = importlib.util.spec_from_file_location("inject_proof", Path(__file__).with_name("test_style_inject.py"))
    inject = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inject)
    injected = inject.stored(tiny_model("flux"), inject.config("flux"), "flux", tmp_path / "adapter.safetensors")
    first, _ = loras()
    (adapted, base), own = both(lambda model: (inject.apply(stock(model, first), injected, 0.5), model))
    once = {"levels": (-3.0,)}
    found, expected = guided(adapted, base, at("flux"), **once), by_hand(*own, WEIGHTS, at("flux"), **once)
    near(found, expected, by_hand(own[0], own[0], WEIGHTS, at("flux"), **once), 1e-4)


@pytest.mark.parametrize("kinds", [("lora", "dora"), ("dora", "our oft"), ("our oft", "lora"), ("lokr", "difference")])
def test_every_kind_in_the_order_of_its_patches(kinds, at):
    tensors = adapters(tiny_model("flux"), "double_blocks.0.img_attn.qkv")
    (adapted, base), own = both(
        lambda model: (apply(apply(model, tensors[kinds[0]], 0.6), tensors[kinds[1]], 0.8), model)
    )
    found, expected = guided(adapted, base, at("flux")), by_hand(*own, WEIGHTS, at("flux"))
    near(found, expected, by_hand(own[0], own[0], WEIGHTS, at("flux")), 5e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float8_e4m3fn])
def test_bases_in_low_precision(precision, at, tiny):
    """The base is as it is stored, bit for bit; the adapter is not rounded with it."""
    model, sampler = tiny("flux", precision), at("flux")
    model.set_model_compute_dtype(torch.float32)
    adapted = stock(model, loras()[0])
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(sampler.positive, sampler.negative)
    only_base = guided(adapted, model, sampler, ("DCO consistency", 1.0, 1e-9), levels=(-3.0,))
    torch.testing.assert_close(only_base, draw(plain, sampler, (-3.0,)))
    unrounded = tiny("flux", precision)
    unrounded.set_model_compute_dtype(torch.float32)
    for parameter in unrounded.model.parameters():
        parameter.data = parameter.data.float()
    expected = by_hand(stock(unrounded, loras()[0]), model, WEIGHTS, sampler)
    near(guided(adapted, model, sampler), expected, by_hand(unrounded, model, WEIGHTS, sampler), 1e-2)


# --------------------------------------------------------------------------------------------------------------------
# What else nodes put on a model or a prompt


def with_cfg_functions(model):
    from comfy_extras.nodes_cfg import CFGNorm
    from comfy_extras.nodes_model_advanced import RescaleCFG

    model = RescaleCFG().patch(model, 0.7)[0]
    return CFGNorm.execute(model, 0.9).args[0]


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_what_acts_on_cfg_acts_on_the_text_and_the_style_is_added(family, at):
    """In one step: ComfyUI's answer with its functions, and 0.7 of what the adapter changes."""
    sampler, model = at(family), tiny_model(family)
    lora = lora_of(model, LAYERS[family])
    adapted = with_cfg_functions(stock(model, lora))
    levels = (-3.0,)

    def predicted(model, cfg):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(sampler.positive, sampler.negative)
        guider.set_cfg(cfg)
        return draw(guider, sampler, levels)

    text, style = predicted(adapted, 3.5), predicted(stock(model, lora), 1.0) - predicted(model, 1.0)
    near(guided(adapted, model, sampler, levels=levels), text + 0.7 * style, text)
    assert torch.equal(guided(adapted, model, sampler, ("FineStyle", 0.0, 2.5), levels=levels), text)


def test_scales_of_styledrop_that_cancel_a_prediction_make_it_where_a_function_needs_it(at):
    sampler, model = at("flux"), tiny_model("flux")
    seen = []

    def after(args):
        seen.append(args["cond_denoised"].norm().item())
        return args["denoised"]

    adapted = stock(model, loras()[0])
    watched = adapted.clone()
    watched.set_model_sampler_post_cfg_function(after)
    found = guided(watched, model, sampler, ("StyleDrop", 2.0, 2.0))
    assert len(seen) == 4 and min(seen) > 0
    torch.testing.assert_close(found, guided(adapted, model, sampler, ("StyleDrop", 2.0, 2.0)), rtol=1e-4, atol=1e-4)


def test_areas_masks_ranges_and_hooked_loras_of_prompts(at):
    import comfy.hooks

    sampler, (first, second) = at("flux"), loras()
    text, values = sampler.positive[0]
    mask = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(1))
    hooks = comfy.hooks.create_hook_lora(lora=second, strength_model=0.8, strength_clip=0.0)

    def prompts():
        return [
            [text, {**values, "area": (8, 16, 0, 0), "strength": 0.7}],
            [text.flip(1), {**values, "mask": mask, "mask_strength": 0.9, "set_area_to_bounds": False}],
            [text * 1.5, {**values, "start_percent": 0.0, "end_percent": 0.6}],
            [text, {**values, "hooks": hooks.clone()}],
        ]

    (adapted, base), own = both(lambda model: (stock(model, first), model))
    plain = by_hand(*own, WEIGHTS, sampler)
    sampler.positive = prompts()
    near(guided(adapted, base, sampler), by_hand(*own, WEIGHTS, sampler), plain, 5e-5)


def test_a_controlnet(at):
    import comfy.controlnet
    import comfy.ops
    from comfy.cldm.cldm import ControlNet
    from tiny_models import SD15

    sampler, lora = at("sd15"), lora_of(tiny_model("sd15"), LAYERS["sd15"])
    config = {name: value for name, value in SD15.items() if name not in ("out_channels", "transformer_depth_output")}
    network = ControlNet(**config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(3)
    for weight in network.parameters():
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)
    hint = torch.rand(1, 3, 128, 128, generator=generator)
    (adapted, base), own = both(lambda model: (stock(model, lora), model), "sd15")
    plain = by_hand(*own, WEIGHTS, sampler)
    text, values = sampler.positive[0]
    sampler.positive = [[text, {**values, "control": control.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))}]]
    near(guided(adapted, base, sampler), by_hand(*own, WEIGHTS, sampler), plain, 5e-5)


@pytest.mark.parametrize(("family", "loader"), [("flux", stock), ("sdxl", stock), ("sdxl", bypass)])
def test_a_negative_prompt_inside_attention(family, loader, at, tiny_prompt):
    """Its keys are made by the layers, with and without the adapter."""
    from stylewright.nodes.bridge.negative import apply as nasa
    from stylewright.training.attention_guidance import AttentionGuidance

    sampler = at(family)
    names = {"flux": ["double_blocks.1.txt_attn.qkv"], "sdxl": LAYERS["sdxl"]}[family]
    lora, unwanted = lora_of(tiny_model(family), names), tiny_prompt(family, 4, 9)

    def make(model):
        with torch.inference_mode():
            negative = nasa(model, unwanted, AttentionGuidance("nag", 3.0), None, None)
        return loader(negative, lora), negative

    (adapted, base), own = both(make, family)
    plain = by_hand(*both(lambda model: (loader(model, lora), model), family)[1], WEIGHTS, sampler)
    near(guided(adapted, base, sampler), by_hand(*own, WEIGHTS, sampler), plain, 5e-5)


def test_what_is_no_adapter_is_the_model_s_for_both(at):
    """Another schedule on model alone, as of nodes between the loader and the guider."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    def shifted(model):
        return ModelSamplingFlux().patch(model, 1.5, 0.5, 512, 512)[0]

    sampler, (first, _) = at("flux"), loras()
    (adapted, base), own = both(lambda model: (shifted(stock(model, first)), model))
    expected = by_hand(own[0], shifted(own[1]), WEIGHTS, sampler)
    found = guided(adapted, base, sampler)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_cache_of_steps_keeps_the_two_models_apart(at):
    """EasyCache knows answers by their prompt: with a threshold of 0 it must change nothing."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    sampler, model = at("flux"), tiny_model("flux")
    adapted = stock(model, loras()[0])
    expected = guided(adapted, model, sampler)
    cached = EasyCacheNode.execute(adapted, 0.0, 0.0, 1.0, False).args[0]
    torch.testing.assert_close(guided(cached, model, sampler), expected)
    guider, _ = node(RULE, EasyCacheNode.execute(adapted, 100.0, 0.3, 0.95, False).args[0], model, *_prompts(sampler))
    skipping = draw(guider, sampler)
    assert skipping.isfinite().all() and (skipping - expected).norm() < expected.norm()


def _prompts(sampler):
    return sampler.positive, sampler.negative


# --------------------------------------------------------------------------------------------------------------------
# Afterwards


@pytest.mark.parametrize("loader", [stock, windowed, bypass])
def test_a_cancel_leaves_nothing(loader, at):
    sampler, model = at("flux"), tiny_model("flux")
    adapted = loader(model, loras()[0])
    forwards = {name: each.forward for name, each in model.model.named_modules()}
    before, expected = guided(model, model, sampler, ("CFG", 2.0)), guided(adapted, model, sampler)
    numbers = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    calls = []

    def stop(*_):
        calls.append(None)
        if len(calls) == stop.at:
            raise InterruptProcessingException

    layer = model.model.diffusion_model.double_blocks[1]
    for stop.at in (1, 2, 3):  # in a call of the base, of the adapted model, and of the next step
        calls.clear()
        with layer.register_forward_hook(stop), pytest.raises(InterruptProcessingException):
            guided(adapted, model, sampler)
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.model.modules())
        assert torch.equal(guided(adapted, model, sampler), expected)
    assert torch.equal(guided(model, model, sampler, ("CFG", 2.0)), before)
    model.detach()
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in model.model.state_dict().items())
    assert {name: each.forward for name, each in model.model.named_modules()} == forwards


def test_the_models_that_came_are_as_they_were(at):
    sampler, model = at("flux"), tiny_model("flux")
    adapted = apply(stock(model, loras()[0]), loras()[1], 0.5, window())
    kept = [(dict(each.patches), each.patches_uuid, {**each.wrappers}) for each in (adapted, model)]
    guider, _ = node(RULE, adapted, model, *_prompts(sampler))
    first = draw(guider, sampler)
    assert torch.equal(draw(guider, sampler), first)
    assert [(dict(each.patches), each.patches_uuid, {**each.wrappers}) for each in (adapted, model)] == kept


# --------------------------------------------------------------------------------------------------------------------
# Refused


def test_two_models_in_memory_are_refused(at, tiny):
    model = tiny("flux")
    with pytest.raises(ValueError, match="two models in memory: link base to what the adapter's loader gets"):
        guided(stock(model, loras()[0]), tiny_model("flux"), at("flux"))


def test_what_cannot_come_and_go_is_refused_with_the_reason(at, tiny):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model = tiny("flux")
    replaced = stock(model, {"diffusion_model.txt_in.set_weight": torch.zeros(64, 32)})
    with pytest.raises(ValueError, match=r"cannot come and go.*weight of diffusion_model.txt_in is replaced"):
        guided(replaced, model, at("flux"))
    merged = ModelMergeSimple().merge(model, tiny_model("flux"), 0.5)[0]
    with pytest.raises(ValueError, match="is merged with another model's"):
        guided(merged, model, at("flux"))
    assert guided(merged, model, at("flux"), ("CFG", 2.0)).isfinite().all()


def test_prompts_of_another_model_are_refused(at, tiny):
    sampler, model = at("flux"), tiny("flux")
    sampler.negative = [[torch.zeros(1, 5, 3), {}]]
    with pytest.raises(ValueError, match="different text encoders"):
        guided(model, model, sampler)
