"""Thresholds between noise levels as a user states them, in one model's sigma, and where they fall among its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...training.noise import PUBLISHED_TOKENS, resolution_shift
from ...training.switching import Switch
from .families import latents_per_token
from .noise_levels import NoiseLevels
from .one_step_levels import LOG_SNR, SIGMA, TIME, levels_to_draw, sigma_of

SHARE = "share of steps"
THRESHOLD_UNITS = (LOG_SNR, SIGMA, TIME, SHARE)
# The paper's thresholds are levels of FLUX's schedule of 28 steps at 1024x1024, -8.892 and -6.541, rounded (arXiv
# 2411.14793v3, Fig. 4). A little noisier than these, so that the steps that it names are on the side that it means.
PAPER = {"paper: after 3 % (-8.89)": -8.9, "paper: after 10 % (-6.52)": -6.55}
AS_GIVEN = "as given below"


@dataclass(frozen=True)
class Thresholds:
    """A :class:`Switch` in a model's own units. ``sigmas``: of its thresholds, exact in float32; what is at or above
    one is of the noisier side."""

    switch: Switch
    sigmas: tuple[float, ...]
    levels: NoiseLevels
    note: str = ""

    def weights(self, sigma: float) -> tuple[float, ...]:
        """How much of each part acts at ComfyUI's sigma."""
        if not self.switch.edge:
            part = sum(sigma < threshold for threshold in self.sigmas)
            return tuple(float(part == each) for each in range(len(self.sigmas) + 1))
        return self.switch.weights(self.log_snr(sigma))

    def log_snr(self, sigma: float) -> float:
        return _log_snr(self.levels, sigma)

    def sigma(self, log_snr: float) -> float:
        return float(self.levels.sigma(torch.tensor([log_snr]))[0])


def read_numbers(text: str, what: str, count: int | None = None) -> list[float]:
    """Finite numbers with commas or spaces between them, so many of them. ValueError says what came instead."""
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{what} are {text!r}: expected numbers with commas between them") from None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{what} are {text!r}: expected finite numbers")
    if count is not None and len(values) != count:
        raise ValueError(f"{what} are {text!r}, {len(values)} of them: expected {count}, one less than what they part")
    return values


def thresholds_of(
    model: Any,
    preset: str,
    text: str,
    unit: str,
    edge: float,
    parts: int,
    sigmas: Tensor | None,
    latent: dict | None,
) -> Thresholds:
    """What the widgets state, for ``parts`` parts. ValueError says what came and what was expected."""
    sampling = model.get_model_object("model_sampling")
    levels = levels_to_draw(sampling)
    _check(sigmas)
    if unit == SHARE and preset == AS_GIVEN:
        found = _of_shares(levels, read_numbers(text, "the thresholds", parts - 1), sigmas)
        switch = Switch(tuple(float(levels.log_snr(torch.tensor(sigma))) for sigma in found), edge)
        return Thresholds(switch, found, levels)
    if preset == AS_GIVEN:
        values = read_numbers(text, "the thresholds", parts - 1)
        moved, note = 0.0, ""
    else:
        if parts != 2:
            raise ValueError(f"the preset {preset!r} has one threshold, and {parts} parts are linked: expected two")
        values, unit = [PAPER[preset]], LOG_SNR
        moved, note = _carried(model, latent)
    try:
        found = tuple(_single(sigma_of(sampling, levels, value + moved, unit)) for value in values)
    except ValueError as error:
        raise ValueError(f"a threshold is out of reach, so that one part would never act: {error}") from None
    for value, sigma in zip(values, found, strict=True):
        if not math.isfinite(_log_snr(levels, sigma)):
            raise ValueError(
                f"the threshold {value:g} ({unit}) is pure noise or no noise at all in float32, so that one part would "
                "never act: expected a level between"
            )
    return Thresholds(Switch(tuple(_log_snr(levels, sigma) for sigma in found), edge), found, levels, note)


def report(thresholds: Thresholds, names: Sequence[str], sigmas: Tensor | None) -> tuple[str, list[str]]:
    """Where each part acts, line by line, and warnings of parts that get no step."""
    lines, warnings = [], []
    steps = None if sigmas is None else [thresholds.weights(float(sigma)) for sigma in sigmas[:-1].float()]
    ends = [math.inf, *thresholds.sigmas, 0.0]
    for number, name in enumerate(names):
        high, low = ends[number], ends[number + 1]
        text = f"{name}: {_between(thresholds, low, high)}"
        if steps is not None:
            own = [step for step, weights in enumerate(steps) if weights[number]]
            text += f"; {_steps(own, len(steps))}"
            if not own:
                warnings.append(f"{name} gets no step of the {len(steps)} that are linked")
        lines.append(text)
    if thresholds.switch.edge:
        lines.append(f"around each threshold a cross-fade over {thresholds.switch.edge:g} in log_snr")
    if thresholds.note:
        lines.append(thresholds.note)
    return "\n".join(lines), warnings


def _check(sigmas: Tensor | None) -> None:
    if sigmas is None:
        return
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool(sigmas.isfinite().all()):
        raise ValueError(
            f"the sigmas have the shape {tuple(sigmas.shape)}: expected a list of two finite numbers or more"
        )
    if not bool((sigmas[:-1] >= sigmas[1:]).all()):
        raise ValueError("the sigmas increase: expected those of a sampler that goes from noise to a picture")


def _of_shares(levels: NoiseLevels, shares: Sequence[float], sigmas: Tensor | None) -> tuple[float, ...]:
    """Thresholds after so large a share of the steps. Models' calls within a step count as of that step."""
    if sigmas is None:
        raise ValueError(f"thresholds in {SHARE} need the steps: link sigmas, those that go into the sampler")
    count = len(sigmas) - 1
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"the shares are {', '.join(f'{s:g}' for s in shares)}: expected numbers between 0 and 1")
    if not all(math.isfinite(levels.log_snr(sigma).item()) for sigma in sigmas[1:-1]):
        raise ValueError("the sigmas are none of this model's levels: link those that go into its sampler")
    after = [round(share * count) for share in shares]
    if any(not 0 < step < count for step in after) or any(a >= b for a, b in zip(after, after[1:], strict=False)):
        raise ValueError(
            f"the shares come after steps {', '.join(map(str, after))} of {count}, so that one part would get no step: "
            "expected them in order, and each part with a step of its own"
        )
    return tuple(_above(float(sigmas[step])) for step in after)


def _carried(model: Any, latent: dict | None) -> tuple[float, str]:
    """What to add to a log_snr that is stated for 1024x1024, and words for it."""
    if latent is None:
        return 0.0, "stated for 1024x1024: link a latent to have it carried to the size of your pictures"
    if "samples" not in latent:
        raise ValueError("the latent has no samples: expected one as of Empty Latent Image or VAE Encode")
    height, width = latent["samples"].shape[-2:]
    tokens = max(1, height * width // latents_per_token(model) ** 2)
    moved = resolution_shift(tokens, PUBLISHED_TOKENS)
    return moved, f"carried from 1024x1024 to a latent of {width}x{height}: {moved:+.2f} in log_snr"


def _between(thresholds: Thresholds, low: float, high: float) -> str:
    def both(sigma: float) -> str:
        return f"log_snr {thresholds.log_snr(sigma):.2f} (sigma {sigma:.4g})"

    if high == math.inf:
        return f"from pure noise to {both(low)}"
    return f"from {both(high)} to " + ("the end" if low == 0 else both(low))


def _steps(own: Sequence[int], count: int) -> str:
    if not own:
        return f"no step of {count}"
    steps = f"step {own[0] + 1}" if len(own) == 1 else f"steps {own[0] + 1} to {own[-1] + 1}"
    return f"{steps} of {count} ({len(own) / count:.0%})"


def _log_snr(levels: NoiseLevels, sigma: float) -> float:
    return float(levels.log_snr(torch.tensor(sigma, dtype=torch.float32)))


def _single(value: float) -> float:
    """The nearest number of float32, which samplers compare in."""
    return float(torch.tensor(value, dtype=torch.float32))


def _above(value: float) -> float:
    """The next larger number of float32."""
    return float(torch.nextafter(torch.tensor(value, dtype=torch.float32), torch.tensor(math.inf)))


def below(value: float) -> float:
    """The next smaller number of float32."""
    return float(torch.nextafter(torch.tensor(value, dtype=torch.float32), torch.tensor(-math.inf)))
