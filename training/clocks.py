"""A model's own time, and its inference schedules, in terms of ``log_snr``.

Time exists only here and in the hosts, at the edge: flow models read a time in [0, 1] or [0, 1000], VP models an index
into their table of betas, EDM models log(sigma) / 4. Every clock turns the same way: large log_snr is clean.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .noise import log_snr_of_time, shift_log_snr, time_of_log_snr, wide

# Flow times 1e-4 from either end: N(-6, 3^2) has 2e-5 of its mass beyond, N(-6, 2^2) next to nothing.
FLOW_RANGE = (-18.42, 18.42)
# Stands for -inf where a table ends at zero SNR; the last index before it is near -15.
LOWEST_LOG_SNR = -20.0


class Clock(Protocol):
    """Two inverse functions between log_snr (n,) and a model's time (n,), both float32."""

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """What the model was trained on, lowest (noise) first."""
        ...

    @property
    def ends(self) -> tuple[float, float]:
        """The times of data and of noise."""
        ...

    def time_of(self, log_snr: Tensor) -> Tensor: ...

    def log_snr_of(self, time: Tensor) -> Tensor: ...


def log_snr_at(clock: Clock, share: Tensor) -> Tensor:
    """log_snr (n,) on the way from data (a ``share`` of 0) to noise (1), in the model's own time.

    Pure noise, where flows have their last time, is -inf.
    """
    data, noise = clock.ends
    return clock.log_snr_of(torch.lerp(torch.full_like(share, data), torch.full_like(share, noise), share))


@dataclass(frozen=True)
class FlowClock:
    """Flow models: time = scale * t with t in [0, 1], 1 = noise. SD3's time has scale 1000, FLUX's 1."""

    scale: float = 1.0
    log_snr_range: tuple[float, float] = FLOW_RANGE

    @property
    def ends(self) -> tuple[float, float]:
        return 0.0, self.scale

    def time_of(self, log_snr: Tensor) -> Tensor:
        return self.scale * time_of_log_snr(log_snr)

    def log_snr_of(self, time: Tensor) -> Tensor:
        return log_snr_of_time(wide(time) / self.scale)


@dataclass(frozen=True, eq=False)
class DiscreteClock:
    """VP models: an index into ``alphas_cumprod`` (T,), which decreases; linear in log_snr between two indices.

    Beyond the table time stops at its first or last index, so that a law of training must be truncated to
    ``log_snr_range`` (see densities.py) instead of leaning on this.
    """

    alphas_cumprod: Tensor

    def __post_init__(self):
        alphas = self.alphas_cumprod
        if alphas.ndim != 1 or len(alphas) < 2 or not bool((alphas[1:] < alphas[:-1]).all()):
            raise ValueError(
                f"Got alphas_cumprod of shape {tuple(alphas.shape)}: expected a decreasing table (T,), T at least 2."
            )

    @property
    def table(self) -> Tensor:
        """log_snr (T,) of the indices, decreasing."""
        return torch.logit(self.alphas_cumprod.double().cpu()).clamp(min=LOWEST_LOG_SNR)

    @property
    def log_snr_range(self) -> tuple[float, float]:
        return self.table[-1].item(), self.table[0].item()

    @property
    def ends(self) -> tuple[float, float]:
        return 0.0, float(len(self.alphas_cumprod) - 1)

    def time_of(self, log_snr: Tensor) -> Tensor:
        log_snrs = self.table.flip(0).to(wide(log_snr))
        return interpolate(wide(log_snr), log_snrs, torch.arange(len(log_snrs)).flip(0).to(log_snrs))

    def log_snr_of(self, time: Tensor) -> Tensor:
        log_snrs = self.table.to(wide(time))
        return interpolate(wide(time), torch.arange(len(log_snrs)).to(log_snrs), log_snrs)


@dataclass(frozen=True)
class EDMClock:
    """EDM models (arXiv 2206.00364, Table 1): time = c_noise = log(sigma) / 4 with alpha = 1."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def log_snr_range(self) -> tuple[float, float]:
        return -2 * math.log(self.sigma_max), -2 * math.log(self.sigma_min)

    @property
    def ends(self) -> tuple[float, float]:
        return math.log(self.sigma_min) / 4, math.log(self.sigma_max) / 4

    def time_of(self, log_snr: Tensor) -> Tensor:
        return -wide(log_snr) / 8

    def log_snr_of(self, time: Tensor) -> Tensor:
        return -8 * wide(time)


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), with xs (n,) increasing; constant beyond its ends."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    share = ((x - xs[left]) / (xs[right] - xs[left])).clamp(0, 1)
    return torch.lerp(ys[left], ys[right], share)


# --------------------------------------------------------------------------------------------------------------------
# The tables of VP models


def scaled_linear_alphas(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Tensor:
    """alphas_cumprod (steps,) of SD1.5 and SDXL: log_snr from 7.07 down to -5.36."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    return torch.cumprod(1 - betas, 0)


def linear_alphas(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Tensor:
    """alphas_cumprod (steps,) of DDPM and PixArt: log_snr from 9.21 down to -10.1."""
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), 0)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The table rescaled so that its last step is pure noise (arXiv 2305.08891, Algorithm 1)."""
    roots = alphas_cumprod.double().sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


# --------------------------------------------------------------------------------------------------------------------
# Inference schedules: log_snr (steps + 1,) in float32, increasing, each entry the level before a step


def flow_schedule(steps: int, shift: float = 1.0) -> Tensor:
    """Evenly spaced flow times from 1 to 0, then the timestep shift: -inf first, +inf last."""
    times = torch.linspace(1, 0, require_steps(steps) + 1, dtype=torch.float64)
    return shift_log_snr(log_snr_of_time(times), shift).float()


def discrete_schedule(clock: DiscreteClock, steps: int) -> Tensor:
    """Evenly spaced indices that begin at the noisiest one (arXiv 2305.08891, "trailing"); +inf last."""
    last = len(clock.alphas_cumprod) - 1
    times = torch.linspace(last, -1, require_steps(steps) + 1, dtype=torch.float64)[:-1]
    return torch.cat([clock.log_snr_of(times).float(), torch.tensor([math.inf])])


def require_steps(steps: int) -> int:
    """``steps``, or ValueError where there is none."""
    if steps < 1:
        raise ValueError(f"Got {steps} sampling steps: expected at least 1.")
    return steps


def flux_shift_mu(tokens: int) -> float:
    """FLUX's shift for a picture of so many tokens: 0.5 at 256, 1.15 at 4096, on a line. The shift is exp(mu)."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
