"""The meter: nothing is lost between reports, and what is not finite is named."""

import pytest
import torch

from stylewright.training.errors import NonFiniteLoss
from stylewright.training.loops.meter import Meter


def filled(bad_step: int | None = None, bad_norm: int | None = None) -> Meter:
    meter = Meter()
    for step in range(3):
        for micro in range(2):
            loss = torch.tensor([1.0 + step, 2.0 + micro])
            if step == bad_step and micro == 1:
                loss[1] = float("nan")
            meter.add(step, (f"{step}-{micro}-a", f"{step}-{micro}-b"), torch.tensor([-6.0, -2.5]), loss)
        meter.add_norm(step, torch.tensor(float("inf") if step == bad_norm else 1.0))
    return meter


def test_a_reading_has_every_sample_of_the_complete_steps_and_forgets_them():
    meter = filled()
    reading = meter.read(done=3)
    assert reading.losses.tolist() == [1, 2, 1, 3, 2, 2, 2, 3, 3, 2, 3, 3]
    assert reading.log_snr.tolist() == [-6.0, -2.5] * 6
    assert reading.by_step == [1.75, 2.25, 2.75]
    assert meter.read(done=3) is None


def test_a_step_under_way_is_not_read():
    assert filled().read(done=2).by_step == [1.75, 2.25]
    assert filled().read(done=0) is None


@pytest.mark.parametrize("look", [lambda meter: meter.check(1), lambda meter: meter.read(3)])
def test_a_loss_that_is_not_finite_is_named(look):
    meter = filled(bad_step=1)
    meter.check(0)
    for _ in range(2):  # again: what followed stays worthless
        with pytest.raises(NonFiniteLoss) as error:
            look(meter)
        assert all(word in str(error.value) for word in ("step 2", "1-1-b", "-2.500", "nan"))
        assert "1-0-a" not in str(error.value)


@pytest.mark.parametrize("look", [lambda meter: meter.check(2), lambda meter: meter.read(3)])
def test_a_gradient_that_is_not_finite_is_named(look):
    with pytest.raises(NonFiniteLoss, match=r"gradient is inf in step 3, .*2-0-a"):
        look(filled(bad_norm=2))


def test_what_came_before_a_bad_step_can_be_read():
    assert filled(bad_step=2).read(done=2).by_step == [1.75, 2.25]
