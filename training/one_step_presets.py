"""What is known of distilled models: at which times they are run, on what noise, and where that is written.

Times count the teacher's 1000, 0 = data; of flows the level is sigma, 1 = noise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor

from .clocks import LOG_SNR, SIGMA, TIME, Clock, log_snr_at
from .noise import log_snr_of_time, time_of_log_snr
from .one_step import ANCESTRAL, FRESH, IMPLIED, SCALED, UNIT

TIMES = 1000  # of every teacher here
LCM_TIMES = tuple(range(999, -1, -20))  # the 50 that consistency distillation uses, noisiest first

Levels = Callable[[int], tuple[float, ...]]


def trailing(steps: int) -> tuple[float, ...]:
    """Times evenly spaced back from the last: 999; 999, 499; … (arXiv 2305.08891, "trailing")."""
    return tuple(round(TIMES - TIMES / steps * step) - 1 for step in range(steps))


def every_hundredth(steps: int) -> tuple[float, ...]:
    """The last times of ten: 999, 899, 799, 699."""
    return tuple(float(TIMES - 1 - 100 * step) for step in range(steps))


def consistency(steps: int) -> tuple[float, ...]:
    """Evenly spaced among the 50 times of LCM (arXiv 2310.04378): 999, 759, 499, 259 of four."""
    return tuple(LCM_TIMES[step * len(LCM_TIMES) // steps] for step in range(steps))


def only(*levels: float) -> Levels:
    """The levels that a model was distilled for, whose number is given."""
    return lambda steps: levels


def towards_zero(time: float) -> Levels:
    """An even share of ``time`` a step: 625; 625, 312; …"""
    return lambda steps: tuple(float(int(time * (1 - step / steps))) for step in range(steps))


def shifted(shift: float) -> Levels:
    """Flow times even in 1 to 0, with a timestep shift (arXiv 2403.03206, section 5.3.2)."""

    def sigmas(steps: int) -> tuple[float, ...]:
        even = [1 - step / steps for step in range(steps)]
        return tuple(shift * time / (1 + (shift - 1) * time) for time in even)

    return sigmas


@dataclass(frozen=True)
class OneStepPreset:
    """A distilled model, or a family of them that are run alike."""

    families: tuple[str, ...]
    prediction: str
    levels: Levels  # times, or sigmas of a flow, for a number of steps
    steps: tuple[int, ...]  # that it may be run with, its usual number first
    side: int  # of its pictures, in pixels
    between: str = FRESH
    start: str = UNIT
    source: str = ""
    stated_in: str = ""  # the unit of its levels; "" = sigma of what predicts a flow, else time

    @property
    def unit(self) -> str:
        """Of its levels."""
        return self.stated_in or (SIGMA if self.prediction == "flow" else TIME)


def one_step_of(clock: Clock, prediction: str, share: float) -> dict[str, Any]:
    """How a student is called, as its file says it: at this share of its teacher's way from data to noise."""
    return {**_stated(clock, log_snr_at(clock, torch.tensor([share]))), "prediction": prediction, "start": UNIT}


def _stated(clock: Clock, log_snr: Tensor) -> dict[str, Any]:
    """A level, log_snr (1,), in the clock's unit. Pure noise has no number in log_snr, and is sigma 1 of every flow."""
    unit = SIGMA if bool(log_snr.isneginf()) else clock.unit
    written = {SIGMA: time_of_log_snr, TIME: clock.time_of, LOG_SNR: torch.clone}
    return {"level": _shortest(written[unit](log_snr)), "unit": unit}


def log_snr_of_call(one_step: Mapping[str, Any], clock: Clock) -> Tensor:
    """log_snr (1,) at which a student is called, as :func:`one_step_of` said it. ``clock`` is its teacher's."""
    read = {SIGMA: log_snr_of_time, TIME: clock.log_snr_of, LOG_SNR: torch.clone}
    return read[one_step["unit"]](torch.tensor([float(one_step["level"])]))


def restated(one_step: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
    """The same call, in the clock's unit: an older file says of EDM models a time."""
    return {**one_step, **_stated(clock, log_snr_of_call(one_step, clock))}


def told_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """What the calls of two students differ in, as :func:`one_step_of` said them: its name, and of either in short.

    None for calls that are alike, but for the rounding of a level.
    """
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        numbers = isinstance(a, float | int) and isinstance(b, float | int)
        if not (isclose(a, b, rel_tol=1e-4) if numbers else a == b):
            return name, _short(a), _short(b)
    return None


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def _shortest(value: Tensor) -> float:
    """The number of one element in float32 with as few digits as tell it: 0.4, and not 0.4000000059604645."""
    rounded = (float(f"{value.item():.{digits}g}") for digits in range(1, 9))
    return next((each for each in rounded if bool(value == torch.tensor(each))), value.item())


def student_preset(family: str, side: int, one_step: Mapping[str, Any]) -> OneStepPreset:
    """What :func:`one_step_of` said, as a preset."""
    return OneStepPreset(
        (family,), one_step["prediction"], only(one_step["level"]), (1,), side, start=one_step["start"],
        source="the file of the student", stated_in=one_step["unit"],
    )  # fmt: skip


ONE_STEP_PRESETS = {
    "SDXL-Turbo": OneStepPreset(
        ("sdxl",), "eps", every_hundredth, (1, 2, 3, 4), 512, ANCESTRAL,
        source="arXiv 2311.17042; Stability-AI/generative-models, turbo.py; ComfyUI, SDTurboScheduler",
    ),
    "SD-Turbo": OneStepPreset(
        ("sd21",), "eps", every_hundredth, (1, 2, 3, 4), 512, ANCESTRAL,
        source="arXiv 2311.17042; Stability-AI/generative-models, turbo.py; ComfyUI, SDTurboScheduler",
    ),
    "SwiftBrush, PG-SB (SD)": OneStepPreset(
        ("sd15", "sd21"), "eps", only(999), (1,), 512,
        source="arXiv 2312.05239, 2408.14176, 2412.02687; VinAIResearch/SwiftBrush, infer.py",
    ),
    "PG-SB (PixArt)": OneStepPreset(("pixart",), "eps", only(999), (1,), 512, source="arXiv 2412.02687"),
    "DMD2 SDXL, 1 step": OneStepPreset(
        ("sdxl",), "eps", only(399), (1,), 1024, source="arXiv 2405.14867; tianweiy/DMD2, README: timesteps=[399]"
    ),
    "DMD2 SDXL, 4 steps": OneStepPreset(
        ("sdxl",), "eps", only(999, 749, 499, 249), (4,), 1024, source="arXiv 2405.14867; tianweiy/DMD2"
    ),
    "DMD, DMD2 (SD1.5)": OneStepPreset(
        ("sd15",), "eps", only(999), (1,), 512, source="arXiv 2311.18828, 2405.14867; tianweiy/DMD2"
    ),
    "PixArt-Alpha-DMD": OneStepPreset(
        ("pixart",), "eps", only(400), (1,), 512,
        source="arXiv 2403.04692; PixArt-alpha/PixArt-sigma, app_pixart_dmd.py: timesteps=[400]",
    ),
    "SiD-LSG (SD)": OneStepPreset(
        ("sd15", "sd21"), "eps", towards_zero(625), (1, 2, 3, 4), 512, start=SCALED,
        source="arXiv 2406.01561; mingyuanzhou/SiD-LSG, sid_sd_util.py: add_noise of zeros at 625",
    ),
    "Hyper-SDXL, 1-step UNet": OneStepPreset(
        ("sdxl",), "eps", only(800), (1,), 1024,
        source="arXiv 2404.13686; ByteDance/Hyper-SD, HyperSDXL1StepUnetScheduler: 800",
    ),
    "Hyper-SD, 1-step LoRA": OneStepPreset(
        ("sd15", "sdxl"), "eps", consistency, (1, 2, 3, 4, 5, 6, 7, 8), 1024,
        source="arXiv 2404.13686; ByteDance/Hyper-SD, README: TCD with eta 1",
    ),
    "Hyper-SD, 2 to 8-step LoRAs": OneStepPreset(
        ("sd15", "sdxl"), "eps", trailing, (4, 2, 8), 1024, IMPLIED,
        source="arXiv 2404.13686; ByteDance/Hyper-SD, README: DDIM, trailing",
    ),
    "SDXL-Lightning, 1 step": OneStepPreset(
        ("sdxl",), "x0", only(999), (1,), 1024,
        source="arXiv 2402.13929; ByteDance/SDXL-Lightning, README: prediction type sample",
    ),
    "SDXL-Lightning, 2 to 8 steps": OneStepPreset(
        ("sdxl",), "eps", trailing, (4, 2, 8), 1024, IMPLIED,
        source="arXiv 2402.13929; ByteDance/SDXL-Lightning, README: Euler, trailing",
    ),
    "LCM, TCD": OneStepPreset(
        ("sd15", "sd21", "sdxl", "pixart"), "eps", consistency, (4, 1, 2, 3, 5, 6, 7, 8), 1024,
        source="arXiv 2310.04378, 2402.19159 (eta 1); diffusers, LCMScheduler",
    ),
    "FLUX.1-schnell": OneStepPreset(
        ("flux",), "flow", shifted(1.0), (4, 1, 2, 3), 1024, IMPLIED,
        source="black-forest-labs/flux, sampling.py: get_schedule without a shift",
    ),
    "Stylewright's embedded student": OneStepPreset(
        ("flux",), "flow", only(1.0), (1,), 128, source="training/embedded/weights/STUDENT.md"
    ),
    "SD3.5-Turbo": OneStepPreset(
        ("sd3",), "flow", shifted(3.0), (4, 1, 2, 3, 5, 6, 7, 8), 1024, IMPLIED,
        source="arXiv 2403.12015; stabilityai/stable-diffusion-3.5-large-turbo: 4 steps, shift 3",
    ),
}  # fmt: skip
