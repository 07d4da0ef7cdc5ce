"""How data and noise are mixed: x_t = alpha * x0 + sigma * eps, and the one coordinate of noise levels.

That coordinate is ``log_snr`` = log(alpha^2 / sigma^2): shape (b,), float32, large = clean, -inf = pure noise.
Half precision never holds a noise level: bf16 has only 26 values in (0.9, 1] and sends 1.6 % of the draws of
N(-6, 3^2) to a time of exactly 1. What arrives in half precision is widened; float64 stays float64.

Flow time (0 = data, 1 = noise) appears only in the conversions at the end.
"""

import math

import torch
from torch import Tensor


def flow(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified flow: alpha = 1 - t, sigma = t. SD3 (arXiv 2403.03206), FLUX."""
    return torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)


def vp(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Variance preserving: alpha^2 + sigma^2 = 1. DDPM (arXiv 2006.11239), SD1.5, SDXL, PixArt."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def ve(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Variance exploding: alpha = 1. EDM (arXiv 2206.00364)."""
    return torch.ones_like(log_snr), torch.exp(-log_snr / 2)


def alpha_sigma(process: str, log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of data and of noise, both shaped like ``log_snr``. ValueError for an unknown process."""
    if process not in PROCESSES:
        raise ValueError(f"Unknown process {process!r}: expected one of {', '.join(PROCESSES)}.")
    return PROCESSES[process](wide(log_snr))


def log_snr_of(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The inverse of :func:`alpha_sigma`, the same for every process: any common factor of the two cancels."""
    return 2 * (torch.log(wide(alpha)) - torch.log(wide(sigma)))


def add_noise(process: str, x0: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """x_t (b, ...) from data and noise (b, ...) at log_snr (b,), in float32."""
    alpha, sigma = alpha_sigma(process, log_snr)
    return expand(alpha, x0) * wide(x0) + expand(sigma, x0) * wide(eps)


def gaussian(shape: tuple[int, ...], generator: torch.Generator, *, offset: float = 0.0) -> Tensor:
    """Unit noise (b, c, ...) in float32, drawn on the generator's device.

    ``offset`` adds noise that is constant over the positions of each sample and channel, with that standard
    deviation. It is part of the noise, so that the target formed from it changes too. The noise drawn without
    an offset is the same noise.
    """
    eps = torch.randn(shape, generator=generator, device=generator.device)
    if offset == 0.0:
        return eps
    constant = torch.randn(shape[:2], generator=generator, device=generator.device)
    return eps + offset * constant.reshape(*shape[:2], *[1] * (len(shape) - 2))


def wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def expand(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, (b,), as (b, 1, 1, ...) beside ``like`` (b, ...). ValueError where the batches differ."""
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"Got noise levels of shape {tuple(values.shape)} for a batch of shape {tuple(like.shape)}: "
            f"expected one a sample, shape ({like.shape[0]},)."
        )
    return values.reshape(-1, *[1] * (like.ndim - 1))


def time_of_log_snr(log_snr: Tensor) -> Tensor:
    """Flow time in [0, 1]: t = sigma = sigmoid(-log_snr / 2). 1 is noise."""
    return torch.sigmoid(-wide(log_snr) / 2)


def log_snr_of_time(time: Tensor) -> Tensor:
    """log_snr = 2 log((1 - t) / t); a time of 1 gives -inf, of 0 gives +inf."""
    return -2 * torch.logit(wide(time))


def shift_log_snr(log_snr: Tensor, shift: float) -> Tensor:
    """The timestep shift t -> k t / (1 + (k - 1) t) with k = ``shift``, which in log_snr is an addition."""
    return log_snr + timestep_shift(shift)


def timestep_shift(shift: float) -> float:
    """What the timestep shift k of SD3 (arXiv 2403.03206, section 5.3.2) adds to a log_snr: -2 log k.

    A shift above 1 moves towards noise; FLUX states the logarithm of its own, mu = log k.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"Got a timestep shift of {shift}: expected a positive number (1 = none, 3 = SD3).")
    return -2 * math.log(shift)


PUBLISHED_TOKENS = 4096  # published laws are stated for pictures of 1024x1024, in tokens of 16x16 pixels


def resolution_shift(tokens: int, reference_tokens: int) -> float:
    """What to add to a log_snr stated for ``reference_tokens`` so that it destroys as much at ``tokens``.

    2 log sqrt(reference_tokens / tokens), the rule of the same section: a smaller picture needs less noise for the
    same loss of content. From 4096 tokens to 64 it carries -6 to -1.84.
    """
    if tokens < 1 or reference_tokens < 1:
        raise ValueError(f"Got {tokens} tokens against a reference of {reference_tokens}: expected at least 1 of each.")
    return math.log(reference_tokens / tokens)


PROCESSES = {"flow": flow, "vp": vp, "ve": ve}
