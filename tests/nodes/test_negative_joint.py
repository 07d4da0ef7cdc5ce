"""Negative prompts in joint attention, on real small models, against two runs in step in float64."""

import joint_proof
import pytest
import torch
from negative_proof import SCALES, draw, guidance
from tiny_models import is_known

pytestmark = pytest.mark.comfy

IMAGE = {  # tokens of the tiny latents
    "flux": 24, "flux-schnell": 24, "flux2": 96, "longcat-image": 24, "chroma": 24, "chroma-radiance": 12, "sd3": 24,
    "sd35-medium": 24, "qwen": 24, "lumina2": 24, "z-image": 32, "z-image-pixel": 32, "hunyuan-video": 24,
    "hunyuan-image21": 96, "hunyuan-video15": 96,
    "hidream": 24, "auraflow": 24,
}  # fmt: skip
FAMILIES = list(IMAGE)


def guided(model, negative, *args, **kwargs):
    from stylewright.nodes.bridge.negative import apply

    return apply(model, negative, *args, **kwargs)


@pytest.fixture(params=FAMILIES)
def family(request):
    if not is_known(request.param):
        pytest.skip("this ComfyUI does not have it")
    return request.param


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("tokens", [5, 9], ids=["shorter", "longer"])
def test_equals_two_runs_in_step(family, method, tokens, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 7, 1), tiny_prompt(family, tokens, 2)
    recorder = joint_proof.recorded(guided(model, negative, guidance(method)), family, positive)
    truths = joint_proof.expected(model, family, recorder, negative, IMAGE[family], method)
    for answer, truth in zip(recorder.answers, truths, strict=True):
        assert relative(answer, truth) < 1e-5
    plain, truth = joint_proof.recorded(model, family, positive).answers[0], truths[0]
    assert relative(plain, truth) > 1e-3, "the negative prompt has to be seen"
    assert relative(recorder.answers[0] - plain, truth - plain) < 1e-3


def relative(found, expected):
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def test_a_scale_of_0_and_an_empty_negative_change_no_bit(family, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 7, 1), tiny_prompt(family, 5, 2)
    base = draw(model, family, positive)
    assert torch.equal(draw(guided(model, negative, guidance("nasa", 0.0)), family, positive), base)
    empty = [[torch.zeros_like(negative[0][0]), negative[0][1]]]
    assert torch.equal(draw(guided(model, empty, guidance("nasa")), family, positive), base)
    assert not torch.equal(draw(guided(model, negative, guidance("nasa")), family, positive), base)
    assert torch.equal(draw(model, family, positive), base)


def test_the_same_text_twice_is_neutral_for_nag(family, tiny, tiny_prompt):
    model, positive = tiny(family), tiny_prompt(family, 7, 1)
    base = draw(model, family, positive)
    assert relative(draw(guided(model, positive, guidance("nag")), family, positive), base) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_of_other_prompts_are_as_without_us(family, batch, tiny, tiny_prompt):
    """In a batch with the positive ones, whose own answer does not depend on them."""
    model, negative = tiny(family), tiny_prompt(family, 5, 2)
    positive, other = tiny_prompt(family, 7, 1), tiny_prompt(family, 7, 3)
    clone = guided(model, negative, guidance("nasa"))
    together = joint_proof.recorded(clone, family, positive, negative=other, cfg=4.0, batch=batch, sigmas=[1.0, 0.0])
    (args, kwargs), answer = together.calls[0], together.answers[0]
    parts = joint_proof.positional(args, kwargs)[5]["cond_or_uncond"]
    assert sorted(parts) == [0, 1]
    answers = dict(zip(parts, answer.chunk(2), strict=True))
    for part, drawn, prompt in ((0, clone, positive), (1, model, other)):
        alone = joint_proof.recorded(drawn, family, prompt, batch=batch, sigmas=[1.0, 0.0]).answers[0]
        assert relative(answers[part], alone) < 1e-6


@pytest.mark.parametrize("method", ["nasa", "nag"])
def test_only_the_layers_that_are_asked_for(family, method, tiny, tiny_prompt):
    """Counted through double and single blocks; the negative text goes on in the others."""
    model, positive, negative = tiny(family), tiny_prompt(family, 7, 1), tiny_prompt(family, 5, 2)
    clone = guided(model, negative, guidance(method), layers=[1])
    recorder = joint_proof.recorded(clone, family, positive)
    options = {"acts": lambda number: number == 1}
    truths = joint_proof.expected(model, family, recorder, negative, IMAGE[family], method, **options)
    for answer, truth in zip(recorder.answers, truths, strict=True):
        assert relative(answer, truth) < 1e-5


def test_a_layer_that_there_is_not_is_named(family, tiny, tiny_prompt):
    model, negative = tiny(family), tiny_prompt(family, 5, 2)
    with pytest.raises(ValueError, match=r"has \d+ attentions to text, 0 to \d+: layer 99 is not one"):
        guided(model, negative, guidance("nag"), layers=[0, 99])


def test_subtracting_the_picture_too(family, tiny, tiny_prompt):
    model, positive, negative = tiny(family), tiny_prompt(family, 7, 1), tiny_prompt(family, 5, 2)
    recorder = joint_proof.recorded(guided(model, negative, guidance("nasa", text_only=False)), family, positive)
    truths = joint_proof.expected(model, family, recorder, negative, IMAGE[family], "nasa", text_only=False)
    for answer, truth in zip(recorder.answers, truths, strict=True):
        assert relative(answer, truth) < 1e-5
