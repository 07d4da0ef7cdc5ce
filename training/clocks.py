"""A model's own time, and its inference schedules, in terms of ``log_snr``.

Time exists only here and in the hosts, at the edge: flow models read a time in [0, 1] or [0, 1000], VP models an index
into their table of betas, EDM models log(sigma) / 4. Every clock turns the same way: large log_snr is clean.

A level is written down in one of three units: ``sigma`` of a flow between data and noise of unit variance, ``time`` as
an index into a table, and ``log_snr``, which is free of what a model calls its times.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .noise import log_snr_of_time, shift_log_snr, time_of_log_snr, timestep_shift, wide

# Flow times 1e-4 from either end: N(-6, 3^2) has 2e-5 of its mass beyond, N(-6, 2^2) next to nothing.
FLOW_RANGE = (-18.42, 18.42)
SIGMA, TIME, LOG_SNR = "sigma", "time", "log_snr"
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

    @property
    def unit(self) -> str:
        """What its levels are written down in, so that nobody who reads them takes them for others."""
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
    """Flow models: x = (1 - t) x0 + spread * t * eps, time = scale * t with t in [0, 1], 1 = noise.

    SD3's time has scale 1000, FLUX's 1. HiDream-O1's noise has a ``spread`` of 8: what a flow of unit noise is at a
    timestep shift of 8. Cosmos-Predict2 is one of unit noise, t = sigma / (1 + sigma), that stops before its ends
    (sigma from 0.002 to 80; diffusers, pipeline_cosmos2_text2image.py).
    """

    scale: float = 1.0
    log_snr_range: tuple[float, float] = FLOW_RANGE
    spread: float = 1.0
    within: tuple[float, float] = (0.0, 1.0)  # t of data and of noise
    unit: str = SIGMA

    @property
    def ends(self) -> tuple[float, float]:
        data, noise = self.within
        return self.scale * data, self.scale * noise

    def time_of(self, log_snr: Tensor) -> Tensor:
        return self.scale * time_of_log_snr(log_snr - timestep_shift(self.spread))

    def log_snr_of(self, time: Tensor) -> Tensor:
        return log_snr_of_time(wide(time) / self.scale) + timestep_shift(self.spread)


@dataclass(frozen=True, eq=False)
class DiscreteClock:
    """VP models: an index into ``alphas_cumprod`` (T,), which decreases; linear in log_snr between two indices.

    Beyond the table time stops at its first or last index, so that a law of training must be truncated to
    ``log_snr_range`` (see densities.py) instead of leaning on this.
    """

    alphas_cumprod: Tensor
    unit: str = TIME

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
    """EDM models (arXiv 2206.00364, Table 1): time = c_noise = log(sigma) / 4 with alpha = 1.

    Their data have a spread of ``sigma_data``, beside which sigma is noise: 0.5 of Playground 2.5 (arXiv 2402.17245)
    and Cosmos (arXiv 2501.03575). Pure noise is never reached: at sigma 80 their log_snr is -10.15.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 1.0
    unit: str = LOG_SNR

    @property
    def log_snr_range(self) -> tuple[float, float]:
        low, high = (2 * math.log(self.sigma_data / sigma) for sigma in (self.sigma_max, self.sigma_min))
        return low, high

    @property
    def ends(self) -> tuple[float, float]:
        return math.log(self.sigma_min) / 4, math.log(self.sigma_max) / 4

    def time_of(self, log_snr: Tensor) -> Tensor:
        return math.log(self.sigma_data) / 4 - wide(log_snr) / 8

    def log_snr_of(self, time: Tensor) -> Tensor:
        return 2 * math.log(self.sigma_data) - 8 * wide(time)


@dataclass(frozen=True)
class AngleClock:
    """VP models in continuous time: alpha = cos(time pi / 2), sigma = sin(time pi / 2).

    The angle of progressive distillation (arXiv 2202.00512, appendix D), 1 = noise; k-diffusion's VDenoiser.
    """

    log_snr_range: tuple[float, float]
    unit: str = LOG_SNR

    @property
    def ends(self) -> tuple[float, float]:
        noise, data = self.time_of(torch.tensor(self.log_snr_range, dtype=torch.float64)).tolist()
        return data, noise

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-wide(log_snr) / 2).atan() * (2 / math.pi)

    def log_snr_of(self, time: Tensor) -> Tensor:
        return -2 * (wide(time) * (math.pi / 2)).tan().log()


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
