"""A world in which everything is known: data N(mean, std^2), independent in each dimension.

Given x_t = alpha * x0 + sigma * eps, (x0, eps) is Gaussian too, so that the best prediction of any kind, its loss and
the end of every sampling trajectory have closed forms. With S = alpha^2 std^2 + sigma^2, the variance of x_t:

    E[x0  | x_t] = mean + alpha std^2 / S (x_t - alpha mean)
    E[eps | x_t] = sigma / S (x_t - alpha mean)
    E|a x0 + b eps - E[. | x_t]|^2 = (alpha b - sigma a)^2 std^2 / S

Written from these formulas alone, without the code under test.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ALPHA_SIGMA = {
    "flow": lambda log_snr: (1 / (1 + torch.exp(-log_snr / 2)), 1 / (1 + torch.exp(log_snr / 2))),
    "vp": lambda log_snr: ((1 + torch.exp(-log_snr)) ** -0.5, (1 + torch.exp(log_snr)) ** -0.5),
    "ve": lambda log_snr: (torch.ones_like(log_snr), torch.exp(-log_snr / 2)),
}
COEFFICIENTS = {
    "x0": lambda alpha, sigma: (1, 0),
    "eps": lambda alpha, sigma: (0, 1),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-1, 1),
}


@dataclass
class GaussianDenoiser:
    """The ideal denoiser of N(mean, std^2); ``mean`` and ``std`` broadcast against latents (b, c, h, w).

    A conditioning that holds a ``mean`` (b, c, h, w) replaces the denoiser's own.
    """

    mean: Tensor
    std: Tensor
    process: str = "flow"
    prediction: str = "flow"
    family: str = "gaussian"
    module: nn.Module = field(default_factory=nn.Identity)
    log_snr_range: tuple[float, float] = (-math.inf, math.inf)

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        mean = conditioning.get("mean", self.mean)
        alpha, sigma = self.alpha_sigma(log_snr)
        a, b = COEFFICIENTS[self.prediction](alpha, sigma)
        surprise = (x_t - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)
        return a * (mean + alpha * self.std**2 * surprise) + b * (sigma * surprise)

    def loss(self, log_snr: Tensor) -> Tensor:
        """The smallest possible expected square, (b, c, h, w) or what broadcasts to it."""
        alpha, sigma = self.alpha_sigma(log_snr)
        a, b = COEFFICIENTS[self.prediction](alpha, sigma)
        return (alpha * b - sigma * a) ** 2 * self.std**2 / (alpha**2 * self.std**2 + sigma**2)

    def data(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws x0 of ``shape`` (b, c, h, w)."""
        return self.mean + self.std * torch.randn(shape, generator=generator)

    def alpha_sigma(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return ALPHA_SIGMA[self.process](log_snr.reshape(-1, 1, 1, 1))


@dataclass
class GaussianMixture:
    """Data from N(means[k], stds[k]^2) with the probability weights[k], in each of one sample's dimensions alike.

    ``means`` (k, c, h, w), ``stds`` (k,) and ``weights`` (k,). x_t is a mixture, too, and given its component k it is
    as above: E[x0 | x_t] = sum_k p(k | x_t) (mean_k + alpha std_k^2 / S_k (x_t - alpha mean_k)).
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    process: str = "flow"

    def x0(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        alpha, sigma = (part.reshape(-1, 1, 1, 1, 1) for part in ALPHA_SIGMA[self.process](log_snr))
        stds = self.stds.reshape(1, -1, 1, 1, 1)
        spread = alpha**2 * stds**2 + sigma**2
        surprise = x_t[:, None] - alpha * self.means
        likely = (-(surprise**2) / (2 * spread) - spread.log() / 2).flatten(2).sum(2)
        share = torch.softmax(likely + self.weights.log(), 1).reshape(len(x_t), -1, 1, 1, 1)
        return (share * (self.means + alpha * stds**2 / spread * surprise)).sum(1)
