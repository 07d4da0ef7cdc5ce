"""Noise levels as a user states them (time, sigma, log_snr), in ComfyUI's sigma, checked against the model.

``time`` is what the network is told: an index of 0 to 999 of models with a table, 0 to 1000 of SD3's, 0 to 1 of FLUX.
"""

import math
from collections.abc import Sequence
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...training.clocks import LOG_SNR, SIGMA, TIME
from .noise_levels import NO_NOISE_RELATION, NoiseLevels, levels_of

UNITS = (TIME, SIGMA, LOG_SNR)
SLACK = 1e-4  # relative: a sigma that was rounded on its way is within the range


def levels_to_draw(sampling: Any) -> NoiseLevels:
    """How the model counts noise. ValueError for one whose input is not a mixture of data and noise."""
    try:
        return levels_of(sampling)
    except ValueError as error:
        names = [kind.__name__ for kind in type(sampling).__mro__]
        kinds = ", ".join([name for name in names if name in NO_NOISE_RELATION] or names)
        raise ValueError(
            f"this model's input is no mixture of data and noise ({kinds}), so that there is no noise to draw from: "
            "use the sampler that its authors name"
        ) from error


def sigma_of(sampling: Any, levels: NoiseLevels, value: float, unit: str) -> float:
    """ComfyUI's sigma of a level. ValueError for one that is outside of the model's range, which it states."""
    low, high = sigma_range(sampling, levels)
    if unit == TIME:
        first, last = time_of(sampling, levels, low), time_of(sampling, levels, high)
        sigma = sigma_of_time(sampling, levels, value) if first - 1e-6 <= value <= last * (1 + 1e-6) else math.nan
    elif unit == LOG_SNR:
        sigma = float(levels.sigma(torch.tensor([value]))[0])
    else:
        sigma = value
    if not low * (1 - SLACK) <= sigma <= high * (1 + SLACK) or sigma <= 0:
        raise ValueError(f"{unit} {value:g} is not one of this model's levels: {range_of(sampling, levels)}")
    return min(max(sigma, low), high)


def sigma_range(sampling: Any, levels: NoiseLevels) -> tuple[float, float]:
    """Smallest and largest sigma. A flow's are those of its process, whatever its table has."""
    if levels.kind.counted == "flow":
        return 0.0, 1.0
    return float(sampling.sigma_min), float(sampling.sigma_max)


def time_of(sampling: Any, levels: NoiseLevels, sigma: float) -> float:
    """What the network is told at a sigma."""
    if sigma == 0.0:
        return 0.0
    return float(sampling.timestep(torch.tensor([sigma]))[0])


def sigma_of_time(sampling: Any, levels: NoiseLevels, time: float) -> float:
    """The inverse of :func:`time_of`. A flow's own ``sigma`` is none: it counts times before their shift."""
    if levels.kind.counted == "flow":
        return time / time_of(sampling, levels, 1.0)
    return float(sampling.sigma(torch.tensor([time]))[0])


def range_of(sampling: Any, levels: NoiseLevels) -> str:
    """The model's levels in all units, for messages."""
    low, high = sigma_range(sampling, levels)
    first, last = time_of(sampling, levels, low), time_of(sampling, levels, high)
    noisy, clean = (float(levels.log_snr(torch.tensor(sigma))) for sigma in (high, low))
    return (
        f"it has time {first:g} to {last:g}, sigma {low:.4g} to {high:.4g}, log_snr {noisy:.2f} to {clean:.2f}"
        + " (0 itself is no noise)" * (low == 0.0)
    )


def schedule(sampling: Any, steps: int) -> list[float]:
    """So many sigmas evenly spaced in the model's own schedule, from its largest: ComfyUI's "simple"."""
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps)[:-1].tolist()


def partly(sampling: Any, sigmas: Sequence[float], denoise: float) -> list[float]:
    """The levels at ``denoise`` times their place in the model's schedule: 0.5 of time 999 is 499.

    Taken from the table of the schedule, so that the network is told the exact time. ValueError where two coincide.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise}: expected more than 0, and at most 1, which is everything")
    if denoise == 1:
        return list(sigmas)
    table = sampling.sigmas.detach().double().cpu()
    places = [int((table.log() - math.log(sigma)).abs().argmin()) + 1 for sigma in sigmas]
    nearer = [round(denoise * place) for place in places]
    if min(nearer) < 1 or len(set(nearer)) < len(nearer):
        raise ValueError(f"denoise {denoise:g} leaves too little of the schedule for {len(sigmas)} steps: raise it")
    return [float(table[place - 1]) for place in nearer]


def check_sigmas(sampling: Any, levels: NoiseLevels, sigmas: Tensor) -> None:
    """ValueError for SIGMAS that this sampler cannot follow."""
    values = sigmas.tolist()
    decreasing = len(values) > 1 and all(a > b for a, b in zip(values[:-1], values[1:], strict=True))
    if not decreasing or values[-1] != 0:
        shown = ", ".join(f"{value:.4g}" for value in values[:8])
        raise ValueError(
            f"the sigmas are [{shown}]: expected one or more that decrease, and then 0, for this sampler ends with a "
            "clean picture"
        )
    for value in values[:-1]:
        sigma_of(sampling, levels, value, SIGMA)


def describe(sampling: Any, levels: NoiseLevels, sigma: float) -> str:
    """A level in every unit."""
    log_snr = float(levels.log_snr(torch.tensor(sigma)))
    return f"time {time_of(sampling, levels, sigma):g} (sigma {sigma:.4g}, log_snr {log_snr:.2f})"
