"""One-step students in ComfyUI: the shipped one, on the shipped model, and how a file configures the sampler."""

import pytest
import torch
from one_step_runs import DEFAULTS, calls_of, hidden, one_step

pytestmark = pytest.mark.comfy

OF_STUDENT = "as the student's file says"
PRESET = "Stylewright's embedded student"


@pytest.fixture(scope="module")
def shipped():
    from stylewright.nodes.embedded_model import EmbeddedModelNode

    with torch.inference_mode():
        return EmbeddedModelNode.execute(one_step=True).args


def encoded(clip, text):
    import nodes

    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(clip, text)[0]


@pytest.mark.parametrize("preset", [OF_STUDENT, PRESET])
def test_the_shipped_student_draws_what_is_asked_for_in_one_call(preset, shipped):
    from stylewright.training.embedded.evaluate import by_words
    from stylewright.training.embedded.oracle import load_oracle, score
    from stylewright.training.embedded.weights import Weights

    model, clip, vae = shipped
    prompts, pictures = by_words(20, 5), []
    with torch.inference_mode(), calls_of(model) as calls:
        for prompt in prompts:
            latent = one_step(model, encoded(clip, prompt.text), preset=preset)
            pictures.append(vae.decode(latent["samples"]).movedim(-1, 1))
    assert len(calls) == len(prompts) and {float(call.time[0]) for call in calls} == {1.0}
    subjects = torch.tensor([prompt.subject for prompt in prompts])
    scores = score(load_oracle(Weights().oracle), torch.cat(pictures), subjects, [prompt.style for prompt in prompts])
    assert scores.subject.float().mean() >= 0.9
    assert scores.whole_style.float().mean() >= 0.7  # 0.88 of many


def test_it_draws_what_the_core_draws(shipped):
    from stylewright.training.cli.generate import level_of, wearing
    from stylewright.training.embedded.weights import Weights
    from stylewright.training.hosts.embedded import load_embedded
    from stylewright.training.one_step import answer_of

    model, clip, _ = shipped
    host = load_embedded()
    with calls_of(model) as calls:
        one_step(model, encoded(clip, "tree in ocean style"), preset=OF_STUDENT)
    level = level_of(Weights().student, host)
    with wearing(host, Weights().student), torch.no_grad():
        x0 = answer_of(host.denoiser, host.encode_prompts(["tree in ocean style"]))(calls[0].x, level)
    torch.testing.assert_close(calls[0].x - calls[0].prediction, x0, atol=0.05, rtol=0)


def test_the_file_on_a_model_says_the_time_and_side(shipped, tiny, tiny_prompt):
    from stylewright.nodes.bridge.students import STUDENT

    model = shipped[0]
    assert model.get_attachment(STUDENT)["side"] == 128 and model.clone().get_attachment(STUDENT)
    other = tiny("sdxl").clone()
    level = {"level": 399.0, "unit": "time", "start": "unit", "prediction": "eps"}
    other.set_attachments(STUDENT, {"family": "sdxl", "side": 64, "one_step": level})
    with calls_of(other) as calls:
        drawn = one_step(other, tiny_prompt("sdxl", 5), preset=OF_STUDENT)
    assert [float(call.time[0]) for call in calls] == [399.0] and drawn["samples"].shape[-1] == 8


def test_a_model_without_a_student_is_refused(tiny, tiny_prompt):
    with pytest.raises(ValueError, match="no file on this model says"):
        one_step(tiny("sdxl"), tiny_prompt("sdxl", 5), preset=OF_STUDENT)


def test_the_loader_marks_the_model_and_a_plain_adapter_does_not(shipped):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors
    from stylewright.nodes.bridge.embedded import load_embedded
    from stylewright.nodes.bridge.students import STUDENT
    from stylewright.training.embedded.weights import Weights

    with torch.inference_mode():
        plain = load_embedded().model
        applied = apply_adapter(plain, None, read_tensors(Weights().student), Strengths(), warn=print)
    assert applied.layers > 40 and not applied.homeless and not applied.missized
    assert applied.model.get_attachment(STUDENT) and plain.get_attachment(STUDENT) is None


def test_two_students_on_a_model_are_said(shipped, caplog):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors
    from stylewright.nodes.one_step import OneStepSamplerParts
    from stylewright.training.embedded.weights import Weights

    model, clip, _ = shipped
    with torch.inference_mode():
        two = apply_adapter(model, None, read_tensors(Weights().student), Strengths(), warn=print).model
    one_step(model, encoded(clip, "tree"), preset=OF_STUDENT)
    assert "students" not in caplog.text
    for preset in (OF_STUDENT, PRESET):
        caplog.clear()
        one_step(two, encoded(clip, "tree"), preset=preset)
        assert "2 one-step students are on this model (student.safetensors, student.safetensors)" in caplog.text
    _, _, said = hidden(OneStepSamplerParts).execute(two, **DEFAULTS | {"preset": OF_STUDENT}).args
    assert "2 one-step students" in said
