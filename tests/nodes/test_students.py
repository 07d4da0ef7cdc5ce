"""One-step students in ComfyUI: the shipped one, on the shipped model, and how a file configures the sampler."""

import math

import pytest
import torch
from one_step_runs import DEFAULTS, calls_of, hidden, one_step
from tiny_models import is_known

from stylewright.training.one_step_presets import one_step_of

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


# Its own times of data and of noise, by the kind of model, and the sampling that a node puts on it.
OWN_TIMES = {
    ("sdxl-edm", None): (math.log(0.002) / 4, math.log(80) / 4),
    ("cosmos", None): (math.log(0.002) / 4, math.log(80) / 4),
    ("cosmos-predict2", None): (0.002 / 1.002, 80 / 81),
    ("hidream-o1", None): (0, 1000),
    ("flux", None): (0, 1),
    ("sdxl", ("ModelSamplingContinuousEDM", "eps", 120.0, 0.002)): (math.log(0.002) / 4, math.log(120) / 4),
    ("sdxl", ("ModelSamplingContinuousV", "v_prediction", 500.0, 0.03)): (
        math.atan(0.03) * 2 / math.pi,
        math.atan(500) * 2 / math.pi,
    ),
    ("sdxl", ("ModelSamplingDiscrete", "lcm", False)): (19, 999),
}


@pytest.mark.parametrize(("family", "sampling"), OWN_TIMES)
def test_what_a_file_says_is_the_share_of_the_models_own_time(family, sampling, tiny, tiny_prompt):
    """Uniform in the time that the network is told, whatever the file states it in."""
    import comfy_extras.nodes_model_advanced as samplings

    from stylewright.nodes.bridge.noise_levels import clock_of, noise_levels
    from stylewright.nodes.bridge.students import STUDENT

    if not is_known(family):
        pytest.skip("a family that this ComfyUI does not know")
    model = tiny(family).clone()
    if sampling:
        name, *widgets = sampling
        model = getattr(samplings, name)().patch(model, *widgets)[0]
    clock, (data, noise) = clock_of(model.get_model_object("model_sampling")), OWN_TIMES[family, sampling]
    for share in (1.0, 0.4):
        said = one_step_of(clock, noise_levels(model).prediction, share)
        model.set_attachments(STUDENT, {"family": family, "side": 64, "one_step": said})
        with calls_of(model) as calls:
            one_step(model, tiny_prompt(family, 5), preset=OF_STUDENT)
        time = data + share * (noise - data)
        nearest = 20 * round((time - 19) / 20) + 19  # of the 50 that LCM knows
        expected = nearest if sampling and "lcm" in sampling else time
        assert float(calls[0].time[0]) == pytest.approx(expected, rel=1e-5)


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
