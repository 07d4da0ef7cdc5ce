"""Negative prompts in joint attention beside what other nodes do to the same model, and what they cost."""

import re
from dataclasses import replace

import joint_proof
import pytest
import torch
from negative_proof import draw, guidance, shape_of
from tiny_models import TINY

pytestmark = pytest.mark.comfy

TOKENS = 24  # of the tiny latents


def guided(model, negative, *args, **kwargs):
    from stylewright.nodes.bridge.negative import apply

    return apply(model, negative, *args, **kwargs)


def relative(found, expected):
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def with_entries(conditioning, **entries):
    return [[text, {**rest, **entries}] for text, rest in conditioning]


def check_in_step(model, family, positive, negative, image, method="nag", **drawing):
    recorder = joint_proof.recorded(guided(model, negative, guidance(method)), family, positive, **drawing)
    truths = joint_proof.expected(model, family, recorder, negative, image, method)
    for answer, truth in zip(recorder.answers, truths, strict=True):
        assert relative(answer, truth) < 1e-5
    return recorder


@pytest.fixture
def residuals():
    """A ControlNet whose answer is the same every time, and which sees what ControlNets are shown."""
    from comfy.controlnet import ControlBase

    class Residuals(ControlBase):
        def __init__(self, width):
            super().__init__()
            self.width, self.seen = width, []

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            self.seen.append((cond["c_crossattn"].shape[1], "optimized_attention_override" in transformer_options))
            draw = torch.Generator().manual_seed(4)
            both = torch.randn(2, 1, TOKENS, self.width, generator=draw).expand(2, x_noisy.shape[0], -1, -1)
            return {"input": [both[0]], "output": [None, both[1]], "middle": []}

        def copy(self):
            return self

        def get_models(self):
            return []

    return Residuals


@pytest.mark.parametrize(("family", "width"), [("flux", 64), ("sd3", 128)])
def test_control_acts_on_the_image_and_sees_the_positive_text_only(family, width, residuals, tiny, tiny_prompt):
    model, control = tiny(family), residuals(width)
    positive = with_entries(tiny_prompt(family, 7, 1), control=control, control_apply_to_uncond=False)
    recorder = check_in_step(model, family, positive, tiny_prompt(family, 5, 2), TOKENS)
    assert joint_proof.positional(*recorder.calls[0])[4]["input"] is not None
    assert set(control.seen) == {(7, False)}


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen"])
def test_reference_pictures_are_image(family, tiny, tiny_prompt):
    model, shape = tiny(family), shape_of(family)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    positive = with_entries(tiny_prompt(family, 7, 1), reference_latents=[latents])
    check_in_step(model, family, positive, tiny_prompt(family, 5, 2), 2 * (96 if family == "flux2" else TOKENS))


def test_a_mask_of_the_positive_text_is_of_it_alone(tiny, tiny_prompt):
    """As Redux has one: how much the image sees of some tokens."""
    mask = torch.zeros(1, 7 + TOKENS, 7 + TOKENS)
    mask[:, 7:, 4:7] = -2.0
    mask[:, 4:7, 7:] = -1.0
    prompt, negative = tiny_prompt("flux", 7, 1), tiny_prompt("flux", 5, 2)
    positive = with_entries(prompt, attention_mask=mask, attention_mask_img_shape=(4, 6))
    model = tiny("flux")
    check_in_step(model, "flux", positive, negative, TOKENS)
    clone = guided(model, negative, guidance("nag"))
    assert not torch.equal(draw(clone, "flux", positive), draw(clone, "flux", prompt))


@pytest.mark.parametrize("family", ["qwen", "hunyuan-video"])
def test_masks_of_padded_texts(family, tiny, tiny_prompt):
    def padded(conditioning, count):
        mask = torch.ones(1, conditioning[0][0].shape[1], dtype=torch.long)
        mask[:, -count:] = 0
        return with_entries(conditioning, attention_mask=mask)

    positive, negative = padded(tiny_prompt(family, 7, 1), 2), padded(tiny_prompt(family, 5, 2), 1)
    model = tiny(family)
    check_in_step(model, family, positive, negative, TOKENS)
    check_in_step(model, family, positive, tiny_prompt(family, 5, 2), TOKENS)
    check_in_step(model, family, tiny_prompt(family, 7, 1), negative, TOKENS, batch=2)


@pytest.mark.parametrize("tokens", [(7, 40), (40, 7)])
def test_texts_of_z_image_that_are_padded_to_other_lengths(tokens, tiny, tiny_prompt, monkeypatch):
    """The image's own padding, which has a place of its own, is none here."""
    monkeypatch.setitem(TINY, "z-image", replace(TINY["z-image"], size=(20, 32)))
    positive, negative = (tiny_prompt("z-image", count, seed) for seed, count in enumerate(tokens))
    check_in_step(tiny("z-image"), "z-image", positive, negative, 160)


def test_tokens_that_another_node_puts_before_the_text_are_of_the_positive(tiny, tiny_prompt):
    """As USO does for a picture of style."""
    model, more = tiny("flux"), torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(8))

    def put_before(given):
        places = torch.zeros_like(given["txt_ids"][:, :3])
        text, places = torch.cat([more, given["txt"]], 1), torch.cat([places, given["txt_ids"]], 1)
        return given | {"txt": text, "txt_ids": places}

    negative, positive = tiny_prompt("flux", 5, 2), tiny_prompt("flux", 7, 1)
    clone = guided(model, negative, guidance("nag"))
    clone.set_model_patch(put_before, "post_input")
    recorder = joint_proof.recorded(clone, "flux", positive)
    truths = joint_proof.expected(model, "flux", recorder, negative, TOKENS, "nag", patches_of_negative={})
    for answer, truth in zip(recorder.answers, truths, strict=True):
        assert relative(answer, truth) < 1e-5


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen"])
def test_another_override_is_called_with_every_part(family, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 7, 1), tiny_prompt(family, 5, 2)
    seen = []

    def override(function, q, *args, **kwargs):
        seen.append(q.shape)
        return function(q, *args, **kwargs)

    clone = guided(model, negative, guidance("nag"))
    expected = draw(clone, family, positive)
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(draw(clone, family, positive), expected)
    assert seen
    assert torch.equal(draw(guided(clone, [], guidance("nag")), family, positive), expected)


@pytest.mark.parametrize("family", ["flux", "sd3", "z-image", "hunyuan-video"])
def test_weights_of_another_node_before_and_after(family, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 7, 1), tiny_prompt(family, 5, 2)
    weights = model.model.diffusion_model.state_dict()
    name = next(key for key, each in weights.items() if re.search("blocks|layers", key) and each.ndim == 2)
    change = {f"diffusion_model.{name}": ("diff", (0.2 * torch.randn(weights[name].shape),))}
    first, last = model.clone(), guided(model, negative, guidance("nasa"))
    without = draw(last, family, positive)
    first.add_patches(change)
    last.add_patches(change)
    expected = draw(guided(first, negative, guidance("nasa")), family, positive)
    assert torch.equal(draw(last, family, positive), expected)
    assert not torch.equal(expected, without)


@pytest.mark.parametrize("family", ["flux", "sd3", "z-image", "hunyuan-video"])
def test_a_failure_leaves_the_model_as_it_was(family, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 7, 1), tiny_prompt(family, 5, 2)
    base = draw(model, family, positive)
    clone, other = guided(model, negative, guidance("nasa")), guided(model, negative, guidance("nag"))
    expected, of_other = draw(clone, family, positive), draw(other, family, positive)
    broken = clone.clone()
    seen = []

    def override(function, *args, **kwargs):
        seen.append(function)
        if len(seen) > 5:
            raise InterruptedError
        return function(*args, **kwargs)

    broken.model_options["transformer_options"]["optimized_attention_override"] = override
    with pytest.raises(InterruptedError):
        draw(broken, family, positive)
    assert torch.equal(draw(model, family, positive), base)
    assert torch.equal(draw(clone, family, positive), expected)
    assert torch.equal(draw(other, family, positive), of_other)
    assert not torch.equal(expected, of_other)


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "z-image", "hunyuan-video15", "hidream"])
def test_several_negatives_are_averaged(family, tiny, tiny_prompt):
    model, positive = tiny(family), tiny_prompt(family, 7, 1)
    first, second = tiny_prompt(family, 5, 2), tiny_prompt(family, 9, 3)
    once = draw(guided(model, first, guidance("nag")), family, positive)
    assert relative(draw(guided(model, first + first, guidance("nag")), family, positive), once) < 1e-5
    both = draw(guided(model, first + second, guidance("nag")), family, positive)
    assert relative(draw(guided(model, second + first, guidance("nag")), family, positive), both) < 1e-5
    assert relative(both, once) > 1e-4


def test_prompts_of_places_each_have_the_negative(tiny, tiny_prompt):
    model, negative = tiny("flux"), tiny_prompt("flux", 5, 2)
    left = torch.zeros(1, *TINY["flux"].size)
    left[..., :6] = 1.0
    prompts = [tiny_prompt("flux", 7, 1), tiny_prompt("flux", 7, 3)]
    clone = guided(model, negative, guidance("nasa"))
    alone = [draw(clone, "flux", prompt, sigmas=[1.0, 0.0]) for prompt in prompts]
    masked = [
        with_entries(prompt, mask=mask, set_area_to_bounds=False, mask_strength=1.0)[0]
        for prompt, mask in zip(prompts, (left, 1 - left), strict=True)
    ]
    expected = alone[0] * left + alone[1] * (1 - left)
    assert relative(draw(clone, "flux", masked, sigmas=[1.0, 0.0]), expected) < 1e-5


def test_two_nodes_at_the_same_noise_level_are_refused(tiny, tiny_prompt):
    negative = tiny_prompt("flux", 5, 2)
    twice = guided(guided(tiny("flux"), negative, guidance("nasa")), negative, guidance("nag"))
    with pytest.raises(ValueError, match="Combine"):
        draw(twice, "flux", tiny_prompt("flux", 7, 1))


def test_a_call_that_is_answered_from_a_cache_is_none_without_effect(tiny, tiny_prompt):
    """EasyCache and its kin leave out calls of a model; a model that never attends is an error."""
    from comfy.patcher_extension import WrappersMP

    clone, positive = guided(tiny("flux"), tiny_prompt("flux", 5, 2), guidance("nag")), tiny_prompt("flux", 7, 1)
    kept = []

    def cached(executor, x, *args, **kwargs):
        kept.append(x if kept else executor(x, *args, **kwargs))
        return kept[-1]

    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", cached)
    draw(clone, "flux", positive)
    assert len(kept) == 2
    other = guided(tiny("flux"), tiny_prompt("flux", 5, 2), guidance("nag"))
    other.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "broken", lambda executor, x, *args, **kwargs: x)
    with pytest.raises(ValueError, match="would do nothing"):
        draw(other, "flux", positive)


def test_keys_that_another_node_adds_are_refused(tiny, tiny_prompt):
    model = guided(tiny("flux"), tiny_prompt("flux", 5, 2), guidance("nasa"))

    def more(function, q, k, v, *args, **kwargs):
        return function(q, torch.cat([k, k], 2), torch.cat([v, v], 2), *args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    def outer(executor, x, timestep, context, y, guidance, latents, control, options, **kwargs):
        ours = options["optimized_attention_override"]
        changed = {
            **options,
            "optimized_attention_override": lambda function, *a, **k: more(_bound(ours, function), *a, **k),
        }
        return executor(x, timestep, context, y, guidance, latents, control, changed, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", outer)
    with pytest.raises(ValueError, match="changed how many keys"):
        draw(model, "flux", tiny_prompt("flux", 7, 1))


def _bound(override, function):
    return lambda *args, **kwargs: override(function, *args, **kwargs)


def flops(model, family, positive, **drawing):
    """Of one call of the model."""
    from stylewright.training.memory import Footprint

    args, kwargs = joint_proof.recorded(model, family, positive, sigmas=[1.0, 0.0], **drawing).calls[0]
    with torch.no_grad(), Footprint() as cost:  # in inference mode products would not be seen
        model.model.apply_model(*args, **kwargs)
    return cost.flops


@pytest.mark.parametrize("method", ["nasa", "nag", "vsf"])
@pytest.mark.parametrize("family", ["flux", "chroma", "sd3", "qwen", "lumina2", "hunyuan-video", "hidream"])
def test_costs_the_negative_tokens_and_one_attention_more(family, method, tiny, tiny_prompt, monkeypatch):
    """Of a picture with 8 times as many tokens as its text."""
    tiny_one = TINY[family]
    monkeypatch.setitem(TINY, family, replace(tiny_one, size=(16, 32)))
    model, positive, negative = tiny(family), tiny_prompt(family, 16, 1), tiny_prompt(family, 16, 2)
    plain = flops(model, family, positive)
    cfg = flops(model, family, positive, negative=negative, cfg=4.0) / plain - 1
    ours = flops(guided(model, negative, guidance(method)), family, positive) / plain - 1
    assert cfg > 0.85
    assert ours < 0.6 * cfg


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_compiled(family, tiny, tiny_prompt):
    """By the backend that compiles nothing but traces all; no new trace in the second step and the next drawing."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, positive, negative = tiny(family), tiny_prompt(family, 7, 1), tiny_prompt(family, 5, 2)
    expected = draw(guided(model, negative, guidance("nag")), family, positive)
    torch._dynamo.reset()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    clone = guided(compiled, negative, guidance("nag"))
    assert relative(draw(clone, family, positive), expected) < 1e-5
    torch._dynamo.utils.counters.clear()
    assert relative(draw(clone, family, positive), expected) < 1e-5
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
