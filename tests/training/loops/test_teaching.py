"""Distillation without images: what is learned is what the teacher answers, at the very batches of the run."""

import copy

import pytest
import torch

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import METHODS, AdapterConfig
from stylewright.training.loops.teaching import Answers, ask
from stylewright.training.loops.train import train


def taught(denoiser, seed=3, size=0.2):
    """A teacher: the same network with other weights."""
    teacher = copy.deepcopy(denoiser)
    with torch.no_grad():
        for number, parameter in enumerate(teacher.module.parameters()):
            source = torch.Generator().manual_seed(seed + number)
            parameter.add_(size * torch.randn(parameter.shape, generator=source))
    return teacher


def learn(denoiser, dataset, config, answers, run_dir=None):
    return train(denoiser, dataset, config, run_dir=run_dir, answers=answers)


def gap(denoiser, teacher, dataset, config, state):
    """Mean square of the difference of answers, on noise that no run has seen."""
    source = torch.Generator().manual_seed(99)
    x = torch.randn((16, *dataset.examples[0].latent.shape), generator=source)
    level = torch.linspace(-4, 2, 16)
    conditioning = {"context": dataset.examples[0].conditioning["context"].expand(16, -1)}
    with torch.no_grad():
        expected = teacher(x, level, conditioning)
        before = (denoiser(x, level, conditioning) - expected).square().mean()
        with attached(denoiser.module, config.adapter, family=denoiser.family, seed=config.seed) as adapter:
            adapter.load_state_dict(state)
            return float((denoiser(x, level, conditioning) - expected).square().mean() / before)


@pytest.mark.parametrize("method", ["lora", "lokr", "styleinject"])
def test_any_adapter_comes_closer_to_the_teacher(method, denoiser, dataset, make_config, tmp_path):
    assert method in METHODS
    teacher, answers = taught(denoiser), Answers(tmp_path / "answers")
    options = {"branches": 2} if method == "styleinject" else {}
    adapter = AdapterConfig(method, rank=4, targets="all", **options)
    config = make_config(steps=120, batch_size=4, learning_rate=0.02, adapter=adapter)
    ask(teacher, denoiser, dataset, config, answers)
    result = learn(denoiser, dataset, config, answers)
    assert gap(denoiser, teacher, dataset, config, result.adapter_state) < 0.6


def test_a_teacher_that_is_the_model_itself_teaches_nothing(denoiser, dataset, make_config, tmp_path):
    config, answers = make_config(steps=3), Answers(tmp_path / "answers")
    ask(denoiser, denoiser, dataset, config, answers)
    result = learn(denoiser, dataset, config, answers)
    assert result.losses == [0.0] * 3


def test_answers_are_asked_for_once_and_a_stopped_run_goes_on(denoiser, dataset, make_config, tmp_path):
    teacher, answers = taught(denoiser), Answers(tmp_path / "answers")
    config = make_config(steps=4)
    ask(teacher, denoiser, dataset, config, answers)
    straight = learn(denoiser, dataset, config, answers, tmp_path / "straight")

    def never(*unused):
        raise AssertionError("asked again")

    never.family, never.process, never.prediction = teacher.family, teacher.process, teacher.prediction
    ask(never, denoiser, dataset, config, answers)
    learn(denoiser, dataset, make_config(steps=2), answers, tmp_path / "stopped")
    stopped = learn(denoiser, dataset, config, answers, tmp_path / "stopped")
    assert stopped.losses == straight.losses
    assert all(torch.equal(stopped.adapter_state[name], value) for name, value in straight.adapter_state.items())
    answers.forget()
    assert not list(answers.folder.iterdir())


def test_another_prediction_is_translated_and_another_family_refused(denoiser, dataset, make_config, tmp_path):
    class Eps:
        family, process, prediction = denoiser.family, denoiser.process, "eps"

        def __call__(self, x_t, log_snr, conditioning):
            from stylewright.training.predictions import convert

            return convert(denoiser(x_t, log_snr, conditioning), "flow", "eps", "flow", x_t, log_snr)

    config, answers = make_config(steps=2), Answers(tmp_path / "answers")
    ask(Eps(), denoiser, dataset, config, answers)
    assert learn(denoiser, dataset, config, answers).losses[0] < 1e-6
    other = taught(denoiser)
    other.family = "sdxl"
    with pytest.raises(ValueError, match="the teacher is a sdxl model of the process flow, and the model that learns"):
        ask(other, denoiser, dataset, config, answers)
