"""CONDITIONING and guidance scales that change with the noise level, by means that every sampler and guider knows.

A CONDITIONING's entries may say from which sigma to which they act: ``timestep_start`` and ``timestep_end``, both
inclusive. Where none acts ComfyUI predicts zero, and where several do it averages, weighted by their ``strength``. So
parts end where the next begins, one float32 number apart; a cross-fade is a stair of ranges in which two parts act
with strengths that sum to 1, which averages *predictions*, and costs a second pass there.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from .sound import check_sound
from .thresholds import Thresholds, below

STAIRS = 16  # of a cross-fade, where no steps are known
PERCENTS = ("start_percent", "end_percent", "clip_start_percent", "clip_end_percent")
KEY = "stylewright.cfg"


@dataclass(frozen=True)
class Piece:
    """Sigmas from ``low`` to ``high``, both inclusive, and what acts there."""

    low: float
    high: float
    weights: tuple[float, ...]


def switched(
    model: comfy.model_patcher.ModelPatcher,
    conditionings: Sequence[list],
    thresholds: Thresholds,
    sigmas: Tensor | None = None,
) -> list:
    """One CONDITIONING of several, each acting in its part, within the ranges that its entries already have."""
    sampling = model.get_model_object("model_sampling")
    entries = []
    for number, conditioning in enumerate(conditionings):
        for text, values in conditioning:
            high, low = _own_range(values, sampling)
            plain = {key: value for key, value in values.items() if key not in PERCENTS}
            for piece in pieces(thresholds, sigmas):
                weight = piece.weights[number]
                start, end = min(high, piece.high), max(low, piece.low)
                if weight and start >= end:
                    entries.append([text, _ranged(plain, start, end, weight)])
    return entries


def check_conditionings(named: Mapping[str, list]) -> None:
    """ValueError names what is no prompt, and prompts of text encoders that do not go together."""
    check_sound(named)
    widths = {
        text.shape[-1]: name for name, conditioning in named.items() for text, _ in conditioning if text is not None
    }
    if len(widths) > 1:
        found = ", ".join(f"{name} has {width} numbers a token" for width, name in widths.items())
        raise ValueError(f"the prompts come from different text encoders ({found}): expected all of the model's own")


def gaps_text(model: comfy.model_patcher.ModelPatcher, conditioning: list, sigmas: Tensor | None) -> list[str]:
    """A warning, in a list, where no prompt acts: prompts may bring ranges of their own."""
    largest = float(model.get_model_object("model_sampling").sigma_max)
    found = gaps(conditioning, sigmas, largest)
    if not found:
        return []
    return [
        f"no prompt acts at sigma {found[0]:.4g} to {found[-1]:.4g}, because of ranges that they brought along, and "
        "there ComfyUI predicts zero: combine them with a prompt that acts there"
    ]


def gaps(conditioning: list, sigmas: Tensor | None, largest: float) -> list[float]:
    """Sigmas at which no entry acts: of the sampler's steps, or where they are not known, of ``largest`` and 256 below
    it."""
    visited = sigmas[:-1].tolist() if sigmas is not None else (torch.linspace(1, 0, 257) * largest).tolist()[:-1]
    return [sigma for sigma in visited if not any(_acts(values, sigma) for _, values in conditioning)]


def _acts(values: dict, sigma: float) -> bool:
    return values.get("timestep_end", 0.0) <= sigma <= values.get("timestep_start", math.inf)


def pieces(thresholds: Thresholds, sigmas: Tensor | None) -> Iterator[Piece]:
    """All levels from infinity to 0, the noisiest first."""
    high = math.inf
    for low, weights in _ends(thresholds, sigmas):
        if low <= high:  # cross-fades may touch each other
            yield Piece(low, high, weights)
            high = below(low)


def _ends(thresholds: Thresholds, sigmas: Tensor | None) -> Iterator[tuple[float, tuple[float, ...]]]:
    """(smallest sigma, weights) of each piece."""
    count = len(thresholds.sigmas) + 1
    alone = [tuple(float(part == each) for each in range(count)) for part in range(count)]
    half = thresholds.switch.edge / 2
    for part, (sigma, threshold) in enumerate(zip(thresholds.sigmas, thresholds.switch.thresholds, strict=True)):
        if not half:
            yield sigma, alone[part]
            continue
        yield thresholds.sigma(threshold - half), alone[part]
        for end, level in _stairs(thresholds, threshold - half, threshold + half, sigmas):
            yield thresholds.sigma(end), thresholds.switch.weights(level)
    yield 0.0, alone[-1]


def _stairs(thresholds: Thresholds, first: float, last: float, sigmas: Tensor | None) -> Iterator[tuple[float, float]]:
    """(end, level whose weights hold) of the ranges of a cross-fade, in log_snr.

    Where the sampler's steps are known each has a range of its own, and so its exact weights.
    """
    visited = [] if sigmas is None else [thresholds.log_snr(sigma) for sigma in sigmas[:-1].tolist()]
    levels = sorted({level for level in visited if first < level < last})
    if not levels:
        width = (last - first) / STAIRS
        levels = [first + width * (step + 0.5) for step in range(STAIRS)]
    ends = [(earlier + later) / 2 for earlier, later in zip(levels, levels[1:], strict=False)]
    yield from zip([*ends, last], levels, strict=True)


def _own_range(values: dict, sampling: Any) -> tuple[float, float]:
    """The (largest, smallest) sigma of an entry as it is, by the rules of ComfyUI's samplers."""
    high, low = values.get("timestep_start", math.inf), values.get("timestep_end", 0.0)
    starts = [values[key] for key in ("start_percent", "clip_start_percent") if values.get(key) is not None]
    ends = [values[key] for key in ("end_percent", "clip_end_percent") if values.get(key) is not None]
    if starts:
        high = min(high, float(sampling.percent_to_sigma(max(starts))))
    if ends:
        low = max(low, float(sampling.percent_to_sigma(min(ends))))
    return high, low


def _ranged(values: dict, start: float, end: float, weight: float) -> dict:
    ranged = dict(values)
    for key, value, is_open in (("timestep_start", start, start == math.inf), ("timestep_end", end, end == 0)):
        ranged.pop(key, None)
        if not is_open:
            ranged[key] = value
    if weight != 1:
        ranged["strength"] = weight * ranged.get("strength", 1.0)
    return ranged


class ScaleByLevel:
    """The wrapper around a guider's predictions (PREDICT_NOISE) that sets its scale for the level of each call."""

    def __init__(self, thresholds: Thresholds, scales: tuple[float, ...], warn: Callable[[str], None]) -> None:
        self._thresholds, self._scales, self._warn = thresholds, scales, warn
        self._warned = False

    def __call__(self, executor: WrapperExecutor, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        before = getattr(guider, "cfg", None)
        if before is None or "negative" not in getattr(guider, "conds", {}):
            if not self._warned:
                self._warn(f"the guider ({type(guider).__name__}) has no scale with a negative prompt: nothing changes")
            self._warned = True
            return executor(x, timestep, *args, **kwargs)
        weights = self._thresholds.weights(float(timestep.flatten()[0]))
        guider.cfg = sum(scale * weight for scale, weight in zip(self._scales, weights, strict=True))
        try:
            return executor(x, timestep, *args, **kwargs)
        finally:
            guider.cfg = before


def with_scales(
    model: comfy.model_patcher.ModelPatcher,
    thresholds: Thresholds,
    scales: Sequence[float],
    warn: Callable[[str], None],
) -> comfy.model_patcher.ModelPatcher:
    """A clone whose guidance scale follows the noise level. One before ours is replaced; where scales are 1, there is
    no pass of the negative prompt."""
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, KEY)
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, ScaleByLevel(thresholds, tuple(scales), warn))
    return patched
