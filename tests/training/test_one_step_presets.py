"""The presets against the schedulers of diffusers that their authors name."""

import pytest
import torch

from stylewright.training.clocks import (
    AngleClock,
    DiscreteClock,
    EDMClock,
    FlowClock,
    linear_alphas,
    log_snr_at,
    zero_terminal_snr,
)
from stylewright.training.noise import time_of_log_snr
from stylewright.training.one_step import ANCESTRAL, FRESH, IMPLIED, SCALED
from stylewright.training.one_step_presets import (
    ONE_STEP_PRESETS,
    consistency,
    log_snr_of_call,
    one_step_of,
    restated,
    student_preset,
    told_apart,
    trailing,
)

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of tables of torch, inside diffusers
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_times_are_those_of_diffusers(steps):
    from diffusers import EulerDiscreteScheduler, LCMScheduler, TCDScheduler

    euler = EulerDiscreteScheduler(**SDXL, timestep_spacing="trailing")
    euler.set_timesteps(steps)
    assert list(trailing(steps)) == euler.timesteps.tolist()
    for kind in (LCMScheduler, TCDScheduler):
        scheduler = kind(**SDXL)
        scheduler.set_timesteps(steps)
        assert list(consistency(steps)) == scheduler.timesteps.tolist()


def test_flows_are_those_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 4, 4).numpy())  # FluxPipeline's, of a model without a shift
    assert list(ONE_STEP_PRESETS["FLUX.1-schnell"].levels(4)) == pytest.approx(scheduler.sigmas[:-1].tolist())
    assert ONE_STEP_PRESETS["SD3.5-Turbo"].levels(4) == pytest.approx((1, 0.9, 0.75, 0.5))


def test_every_preset_is_complete():
    assert len(ONE_STEP_PRESETS) > 10
    for name, preset in ONE_STEP_PRESETS.items():
        assert preset.families and preset.source and preset.side in (128, 512, 1024), name
        assert len(set(preset.steps)) == len(preset.steps), name
        last = 1.0 if preset.unit == "sigma" else 999
        for steps in preset.steps:
            levels = preset.levels(steps)
            assert len(levels) == steps and list(levels) == sorted(set(levels), reverse=True), name
            assert levels[-1] > 0 and levels[0] <= last, name


def test_what_the_sources_say():
    """Reference values, each from the source that its preset names."""
    first = {name: preset.levels(preset.steps[0]) for name, preset in ONE_STEP_PRESETS.items()}
    assert first["DMD2 SDXL, 1 step"] == (399,)
    assert first["DMD2 SDXL, 4 steps"] == (999, 749, 499, 249)
    assert first["PixArt-Alpha-DMD"] == (400,)
    assert first["Hyper-SDXL, 1-step UNet"] == (800,)
    assert first["SiD-LSG (SD)"] == (625,) and ONE_STEP_PRESETS["SiD-LSG (SD)"].start == SCALED
    assert ONE_STEP_PRESETS["SDXL-Lightning, 1 step"].prediction == "x0"
    deterministic = {name for name, preset in ONE_STEP_PRESETS.items() if preset.between == IMPLIED}
    assert deterministic == {
        "Hyper-SD, 2 to 8-step LoRAs", "SDXL-Lightning, 2 to 8 steps", "FLUX.1-schnell", "SD3.5-Turbo",
    }  # fmt: skip
    assert {name for name, preset in ONE_STEP_PRESETS.items() if preset.between == ANCESTRAL} == {
        "SDXL-Turbo",
        "SD-Turbo",
    }
    assert ONE_STEP_PRESETS["SDXL-Turbo"].levels(4) == (999, 899, 799, 699)
    assert ONE_STEP_PRESETS["DMD2 SDXL, 4 steps"].between == FRESH


@pytest.mark.parametrize("share", [1.0, 0.4, 0.123, 1 / 3])
def test_a_students_level_has_no_more_digits_than_tell_it(share):
    exact = time_of_log_snr(log_snr_at(FlowClock(), torch.tensor([share])))
    level = one_step_of(FlowClock(), "flow", share)["level"]
    assert torch.equal(torch.tensor([level]), exact) and len(str(level)) <= 11
    assert share == 1 / 3 or level == share


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize(
    ("clock", "unit"),
    [
        (FlowClock(), "sigma"), (FlowClock(1000.0), "sigma"), (DiscreteClock(linear_alphas()), "time"),
        (DiscreteClock(zero_terminal_snr(linear_alphas())), "time"), (EDMClock(sigma_data=0.5), "log_snr"),
        (FlowClock(spread=8.0, unit="log_snr"), "log_snr"), (AngleClock((-12.0, 7.0)), "log_snr"),
        (FlowClock(within=(0.002, 80 / 81), unit="log_snr"), "log_snr"),
    ],
)  # fmt: skip
def test_what_a_file_says_of_a_level_is_the_level(clock, unit, share):
    called = one_step_of(clock, "v", share)
    exact = log_snr_at(clock, torch.tensor([share]))
    torch.testing.assert_close(log_snr_of_call(called, clock), exact, rtol=1e-6, atol=1e-6)
    assert called["unit"] == ("sigma" if exact.isneginf() else unit)  # pure noise has no number in log_snr
    assert called["level"] == 1.0 or not exact.isneginf()
    preset = student_preset("sdxl", 512, called)
    assert preset.levels(1) == (called["level"],) and preset.unit == called["unit"]


def test_an_older_file_of_an_edm_model_says_the_same():
    """They stated the network's own time."""
    clock = EDMClock()
    older = {"level": clock.ends[1], "unit": "time", "prediction": "v", "start": "unit"}
    now = one_step_of(clock, "v", 1.0)
    assert now["unit"] == "log_snr" and told_apart(restated(older, clock), now) is None
    assert told_apart(restated({**older, "level": 0.5}, clock), now)
