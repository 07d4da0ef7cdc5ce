"""Laws of the noise level: which ``log_snr`` a training step draws.

Style-Friendly SNR Sampler (arXiv 2411.14793, Eq. 6): log_snr ~ N(mu, sigma^2) with mu = -6, far on the noisy side,
where the style of a picture is decided. The draw is the whole method: the loss keeps its weight of 1 and no timestep
shift is applied afterwards.

Every law is the inverse CDF of one uniform draw u in (0, 1), so that u -> 0 is noise and u -> 1 is clean. Two things
then need no code of their own: stratified draws stratify every law, and a law truncated to what a model knows is
the same law of u squeezed between two shares. Computation in float64 on the CPU, results in float32.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .clocks import interpolate
from .noise import time_of_log_snr, timestep_shift

# Uniforms of exactly 0 or 1 belong to infinite noise levels. One step of float64 inside, the normal's quantile is
# finite (8.2 standard deviations), and the mass that moves is 1e-16.
SMALLEST_SHARE = 2.0**-53
# Style-Friendly SNR Sampler, v3, Fig. 4: above this log_snr another prompt no longer changes the style.
STYLE_WINDOW = -6.52
# A range that a law reaches less often than this is a mistake of the user's, not a law to sample from.
SMALLEST_MASS = 1e-9


class Density(Protocol):
    """A law of log_snr."""

    def icdf(self, u: Tensor) -> Tensor:
        """log_snr (n,) in float32 below which the share ``u`` (n,) in (0, 1) of the law lies; increasing."""
        ...

    def cdf(self, log_snr: Tensor) -> Tensor:
        """Share of the law below each log_snr (n,), in float64."""
        ...

    def describe(self) -> dict:
        """What goes into logs and files: ``law`` and its parameters."""
        ...


@dataclass(frozen=True)
class Normal:
    """N(mu, sigma^2), the paper's law. In flow time it is a logit-normal with mean -mu / 2 and deviation sigma / 2."""

    mu: float
    sigma: float

    def __post_init__(self):
        if not (math.isfinite(self.mu) and 0 < self.sigma < math.inf):
            raise ValueError(f"Got mu={self.mu} and sigma={self.sigma}: expected a finite mu and a positive sigma.")

    def icdf(self, u: Tensor) -> Tensor:
        return (self.mu + self.sigma * torch.special.ndtri(inside(u))).float()

    def cdf(self, log_snr: Tensor) -> Tensor:
        # ndtr by way of erfc, which unlike torch's ndtr is right to the last digits in the far tail on the noisy side.
        return torch.special.erfc((self.mu - log_snr.double()) / (self.sigma * math.sqrt(2))) / 2

    def describe(self) -> dict:
        return {"law": "normal", "mu": self.mu, "sigma": self.sigma}


def logit_normal(mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Normal:
    """SD3's law (arXiv 2403.03206, section 3.1): logit(t) ~ N(mean, std^2), then the timestep shift."""
    return Normal(mu=-2 * mean + timestep_shift(shift), sigma=2 * std)


@dataclass(frozen=True)
class UniformTime:
    """Uniform in flow time, then the timestep shift. In log_snr it is a logistic law of scale 2."""

    shift: float = 1.0

    def __post_init__(self):
        timestep_shift(self.shift)  # refuses what is no shift

    def icdf(self, u: Tensor) -> Tensor:
        return (2 * torch.logit(inside(u)) + timestep_shift(self.shift)).float()

    def cdf(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid((log_snr.double() - timestep_shift(self.shift)) / 2)

    def describe(self) -> dict:
        return {"law": "uniform-time", "shift": self.shift}


@dataclass(frozen=True)
class Tabulated:
    """A law given by points of its CDF, ``shares`` from 0 to 1 at increasing ``log_snr``, linear in between."""

    log_snr: tuple[float, ...]
    shares: tuple[float, ...]
    name: str = "tabulated"

    def __post_init__(self):
        require_increasing("log_snr", self.log_snr)
        require_increasing("shares", self.shares)
        if len(self.log_snr) != len(self.shares) or self.shares[0] != 0 or self.shares[-1] != 1:
            raise ValueError(
                f"Got {len(self.log_snr)} noise levels and {len(self.shares)} shares from {self.shares[0]} to "
                f"{self.shares[-1]}: expected as many shares as noise levels, from 0 to 1."
            )

    def icdf(self, u: Tensor) -> Tensor:
        return interpolate(inside(u), table(self.shares), table(self.log_snr)).float()

    def cdf(self, log_snr: Tensor) -> Tensor:
        return interpolate(log_snr.double(), table(self.log_snr), table(self.shares))

    def describe(self) -> dict:
        return {"law": self.name, "low": self.log_snr[0], "high": self.log_snr[-1], "points": len(self.log_snr)}


@dataclass(frozen=True)
class Mixture:
    """Each draw from one of ``parts``, chosen with probabilities proportional to ``weights``."""

    parts: tuple[Density, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if not self.parts or len(self.parts) != len(self.weights) or not all(weight > 0 for weight in self.weights):
            raise ValueError(
                f"Got {len(self.parts)} parts with weights {self.weights}: expected one positive weight a part."
            )

    def icdf(self, u: Tensor) -> Tensor:
        # The CDF is an average, so the quantile lies between the parts' quantiles: bisect there, to 2^-60 of the gap.
        quantiles = torch.stack([part.icdf(u) for part in self.parts]).double()
        low, high = quantiles.amin(0), quantiles.amax(0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle) < inside(u)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).float()

    def cdf(self, log_snr: Tensor) -> Tensor:
        shares = [weight * part.cdf(log_snr) for part, weight in zip(self.parts, self.weights, strict=True)]
        return torch.stack(shares).sum(0) / sum(self.weights)

    def describe(self) -> dict:
        parts = [part.describe() for part in self.parts]
        return {"law": "mixture", "weights": list(self.weights), "parts": parts}


@dataclass(frozen=True)
class Shifted:
    """A law moved by ``delta`` in log_snr; below 0 is towards noise."""

    density: Density
    delta: float

    def icdf(self, u: Tensor) -> Tensor:
        return self.density.icdf(u) + self.delta

    def cdf(self, log_snr: Tensor) -> Tensor:
        return self.density.cdf(log_snr.double() - self.delta)

    def describe(self) -> dict:
        return {"law": "shifted", "delta": self.delta, "of": self.density.describe()}


@dataclass(frozen=True)
class Truncated:
    """A law conditioned on [low, high], through its inverse CDF.

    Clamping instead would pile up at the ends what lies outside: 62 % of N(-6, 2^2) on SD1.5, whose range is
    [-5.36, 7.07]. Where the law has next to no mass in the range, ValueError.
    """

    density: Density
    low: float
    high: float

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"Got a range of log_snr from {self.low} to {self.high}: expected low < high.")
        below, up_to = self.shares()
        if not up_to - below > SMALLEST_MASS:
            raise ValueError(
                f"The density {sentence(self.density.describe())} has a share of {up_to - below:.1e} within the "
                f"model's range of log_snr, [{self.low:.2f}, {self.high:.2f}]: move its mean towards that range."
            )

    def shares(self) -> tuple[float, float]:
        """Shares of the whole law below ``low`` and below ``high``."""
        below, up_to = self.density.cdf(torch.tensor([self.low, self.high], dtype=torch.float64)).tolist()
        return below, up_to

    def icdf(self, u: Tensor) -> Tensor:
        below, up_to = self.shares()
        log_snr = self.density.icdf(below + (up_to - below) * inside(u))
        return log_snr.clamp(self.low, self.high)  # against rounding only: no mass lies outside

    def cdf(self, log_snr: Tensor) -> Tensor:
        below, up_to = self.shares()
        return ((self.density.cdf(log_snr) - below) / (up_to - below)).clamp(0, 1)

    def describe(self) -> dict:
        return {"law": "truncated", "low": self.low, "high": self.high, "of": self.density.describe()}


# --------------------------------------------------------------------------------------------------------------------
# Drawing, and what a law looks like


def stratified_uniform(n: int, generator: torch.Generator) -> Tensor:
    """n uniforms (n,) in (0, 1), float64: exactly one in each [i/n, (i+1)/n), in random order.

    Each one alone is uniform, so that the law drawn through them is unchanged; only the noise between them is gone.
    """
    cells = 2**32  # with n up to a million every sum below is exact in float64, and 0 and 1 cannot occur
    within = torch.randint(cells, (n,), generator=generator, device=generator.device, dtype=torch.int64)
    stratum = torch.randperm(n, generator=generator, device=generator.device)
    return (stratum + (within.double() + 0.5) / cells) / n


def share_below(density: Density, log_snr: float) -> float:
    """P(draw < log_snr)."""
    return density.cdf(torch.tensor([log_snr], dtype=torch.float64)).item()


def quantiles(density: Density, shares: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> list[float]:
    """log_snr below which each of ``shares`` lies."""
    return density.icdf(torch.tensor(shares, dtype=torch.float64)).tolist()


def mean_time(density: Density, points: int = 100_000) -> float:
    """Mean flow time of the draws (1 = noise): 0.931 for N(-6, 2^2). A reversed mapping would show as 0.069."""
    middles = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return time_of_log_snr(density.icdf(middles).double()).mean().item()


def inside(u: Tensor) -> Tensor:
    """Uniforms in float64, kept off 0 and 1. ValueError for what is no uniform."""
    if not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(f"Got uniforms from {u.min().item()} to {u.max().item()}: expected values in (0, 1).")
    return u.double().clamp(SMALLEST_SHARE, 1 - SMALLEST_SHARE)


def table(values: tuple[float, ...]) -> Tensor:
    """(n,) in float64."""
    return torch.tensor(values, dtype=torch.float64)


def require_increasing(name: str, values: tuple[float, ...]) -> None:
    """ValueError unless ``values`` are finite and increase, two at least."""
    rising = all(left < right for left, right in pairwise(values))
    if len(values) < 2 or not rising or not all(math.isfinite(value) for value in values):
        raise ValueError(f"Got {name} {values[:4]} … of length {len(values)}: expected finite, increasing values.")


def sentence(law: dict) -> str:
    """What :meth:`Density.describe` gave, in one line: "truncated low=-5.36 high=7.07 of normal mu=-6 sigma=2"."""
    words = [law["law"]]
    for name, value in law.items():
        if name == "of":
            words.append(f"of {sentence(value)}")
        elif name == "parts":
            words.append(f"of ({'; '.join(map(sentence, value))})")
        elif name != "law":
            words.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
    return " ".join(words)
