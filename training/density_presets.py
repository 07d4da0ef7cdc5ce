"""Laws of the noise level by name, and the law of a run: a preset with changes, on a model and its pictures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .clocks import FLOW_RANGE, DiscreteClock, flux_shift_mu, scaled_linear_alphas
from .densities import STYLE_WINDOW, Density, Mixture, Normal, Shifted, Tabulated, Truncated, UniformTime, logit_normal
from .noise import resolution_shift, timestep_shift


def schedule_percent(log_snr_of_percent: Tensor) -> Tabulated:
    """Uniform in a model's schedule percent (0 = noise, 1 = clean), which is what ComfyUI's own trainer draws.

    ``log_snr_of_percent`` (n,) is the schedule at evenly spaced percents, increasing. A shifted flow model needs no
    table: its law is :class:`UniformTime` with the model's shift.
    """
    shares = torch.linspace(0, 1, len(log_snr_of_percent), dtype=torch.float64)
    return Tabulated(tuple(log_snr_of_percent.tolist()), tuple(shares.tolist()), name="schedule-percent")


SD3 = logit_normal(shift=3.0)

DENSITIES: dict[str, Density] = {
    "style-friendly": Normal(-6.0, 2.0),  # the paper's first version, and its choice for SD3.5
    "style-friendly-sd3.5": Normal(-6.0, 2.0),
    "style-friendly-flux": Normal(-6.0, 3.0),
    "objects": Normal(-2.2, 2.0),  # v1 Fig. S5, v3 Fig. S8: objects lose their parts at a lower mean
    "sd3": SD3,  # the paper's baseline on both models, N(-2.197, 2^2)
    "logit-normal": logit_normal(),
    "uniform": UniformTime(),
    "schedule-sd": schedule_percent(DiscreteClock(scaled_linear_alphas()).table.flip(0)),  # SD1.5, SDXL
    "schedule-sd3": UniformTime(shift=3.0),
    "schedule-flux": UniformTime(shift=math.exp(flux_shift_mu(4096))),
    "style-and-detail": Mixture((Normal(-6.0, 2.0), SD3), (0.75, 0.25)),  # keeps training fine texture too
}


@dataclass(frozen=True)
class DensityConfig:
    """The law of a run, as a user states it."""

    preset: str = "style-friendly"  # a key of DENSITIES
    mu: float | None = None  # replaces the mean of a normal preset; None = as in the preset
    sigma: float | None = None  # replaces its standard deviation
    shift: float = 1.0  # a further timestep shift, which adds -2 log(shift); the paper applies none
    reference_tokens: int | None = None  # the law is stated for this many image tokens; None = as the model has it

    def stated_for(self, reference_tokens: int | None) -> "DensityConfig":
        """The law as stated for pictures of so many image tokens (None = for any number), unless it says itself."""
        return self if self.reference_tokens is not None else replace(self, reference_tokens=reference_tokens)


def preset_name(config: Mapping[str, Any]) -> str:
    """The preset of a configuration as files state it, with the fields of :class:`DensityConfig`; "" = changed."""
    law, name = DENSITIES.get(config.get("preset", "")), config.get("preset", "")
    own = {"mu": config.get("mu"), "sigma": config.get("sigma")}
    changed = any(value is not None and value != getattr(law, each, None) for each, value in own.items())
    return "" if law is None or changed else name


def style_window(config: DensityConfig, tokens: int) -> float:
    """The log_snr below which pictures of ``tokens`` image tokens get their style.

    The paper's is for 1024x1024. Where the law is carried to another size, what it aims at has moved as far.
    """
    moved = 0.0 if config.reference_tokens is None else resolution_shift(tokens, config.reference_tokens)
    return STYLE_WINDOW + moved


def build_density(config: DensityConfig, log_snr_range: tuple[float, float], tokens: int) -> Density:
    """The law that a run on a model with ``log_snr_range`` and pictures of ``tokens`` image tokens draws from.

    The preset with the user's mean and deviation, shifted, carried from ``reference_tokens`` to ``tokens`` where a
    reference is given (see :func:`noise.resolution_shift`), and truncated to what the model knows, or to flow times
    between 1e-4 and 1 - 1e-4 where that is narrower.
    """
    density = preset_density(config)
    if config.shift != 1.0:
        density = Shifted(density, timestep_shift(config.shift))
    if config.reference_tokens is not None:
        density = Shifted(density, resolution_shift(tokens, config.reference_tokens))
    return Truncated(density, max(log_snr_range[0], FLOW_RANGE[0]), min(log_snr_range[1], FLOW_RANGE[1]))


def preset_density(config: DensityConfig) -> Density:
    """The preset, with ``mu`` and ``sigma`` replaced where they are given. ValueError where it has none."""
    if config.preset not in DENSITIES:
        raise ValueError(f"Unknown density {config.preset!r}: expected one of {', '.join(DENSITIES)}.")
    density = DENSITIES[config.preset]
    changes = {name: value for name, value in (("mu", config.mu), ("sigma", config.sigma)) if value is not None}
    if not changes:
        return density
    if not isinstance(density, Normal):
        normal = [name for name, law in DENSITIES.items() if isinstance(law, Normal)]
        raise ValueError(
            f"The density {config.preset!r} has no {' and no '.join(changes)}: expected one of {', '.join(normal)}."
        )
    return replace(density, **changes)
