"""The start of a student by regression on what its teacher draws in many steps."""

import pytest
import torch

from stylewright.training.clocks import DiscreteClock, flow_schedule, log_snr_at, scaled_linear_alphas
from stylewright.training.noise import gaussian
from stylewright.training.one_step import answer_of
from stylewright.training.randomness import generator
from stylewright.training.sampling import sample

from .conftest import CHANNELS, HEIGHT, WIDTH
from .test_distil import PROMPTS, Timed, config_of, encode, run

FIRST = {"pretraining_steps": 3, "pretraining_teacher_steps": 4}


def pair(place, scale=1.0):
    """The student's first answer and the teacher's picture, by the functions that draw pictures."""
    model, prompts = Timed(), PROMPTS.drawn(0, place, 4)
    noise = gaussian((4, CHANNELS, HEIGHT, WIDTH), generator(0, "student", place))
    told, null = encode(prompts), encode([""] * 4)
    data = sample(model, noise, told, log_snrs=flow_schedule(4), null_conditioning=null, guidance_scale=scale)
    answer = answer_of(model, told)(noise, log_snr_at(model.clock, torch.ones(4)))
    return answer.detach(), data


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 1.0),
        ({"convention": "dmd", "guidance_low": 2.0, "guidance_high": 4.0}, 3.0),
        ({"pretraining_guidance": 2.5}, 2.5),
    ],
)
def test_the_first_loss_is_half_the_square_to_the_teachers_own_picture(changes, scale):
    answer, data = pair(0, scale)
    first = run(**FIRST, **changes).history[0]
    assert first.loss == pytest.approx(((answer - data).square().mean() / 2).item(), rel=1e-5)
    assert "apart" not in first.others and first.others["fake_loss"] > 0


def test_afterwards_distributions_are_matched():
    history = run(**FIRST).history
    assert ["apart" in event.others for event in history] == [False] * 3 + [True] * 3


def test_pairs_come_again_and_are_drawn_once():
    model = Timed()
    run(on=model, **{**FIRST, "pretraining_steps": 6}, pretraining_pairs=7)  # two steps of four samples
    assert len(model.calls) == 6 * 2 + 2 * 4  # of student and fake, and of the teacher for two
    contexts = [context for _, context in model.calls]
    students = [contexts[0], contexts[6]] + contexts[12::2]  # its own call comes first in each step
    assert all(torch.equal(students[i], students[i % 2]) for i in range(6))
    assert not torch.equal(students[0], students[1])


def test_the_student_learns_them():
    options = {"pretraining_pairs": 4, "pretraining_steps": 150, "steps": 150, "save_every": 0, "ema_decay": 0.0}
    adapter = {"learning_rate": 2e-2, "pretraining_guidance": 4.0, "pretraining_teacher_steps": 4}
    history = run(**options, **adapter).history
    assert history[-1].loss < history[0].loss / 4


@pytest.mark.parametrize("pairs", [0, 8])
def test_stopped_and_continued_is_the_run_that_never_stopped(pairs, tmp_path):
    options = {**FIRST, "pretraining_steps": 4, "pretraining_pairs": pairs}
    whole = run(tmp_path / "whole", **options)

    def stop(event):
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", report=stop, **options)
    again = run(tmp_path / "parts", **options)
    assert all(torch.equal(again.adapter_state[name], tensor) for name, tensor in whole.adapter_state.items())
    assert [event.loss for event in again.history] == [event.loss for event in whole.history]


def test_a_model_with_a_table_of_times_is_sampled_to_its_data():
    class Noisy(Timed):
        process, prediction = "vp", "eps"
        clock = DiscreteClock(scaled_linear_alphas())

    assert run(on=Noisy(), **FIRST).steps_done == 6


def test_all_weights_may_begin_so():
    history = run(full=True, **FIRST).history
    assert history[0].loss == pytest.approx(run(**FIRST).history[0].loss, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretraining_steps": 7}, "up to steps=6"),
        ({"pretraining_pairs": 8}, "with pretraining_steps"),
        ({"pretraining_teacher_steps": 0}, "pretraining_teacher_steps=0"),
        ({"pretraining_guidance": -1.0, "pretraining_steps": 2}, "pretraining_guidance=-1.0"),
        ({"pretraining_guidance": 3.0}, "with pretraining_steps"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config_of(**changes)
