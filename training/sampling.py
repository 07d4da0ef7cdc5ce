"""From noise to data with any denoiser: the deterministic DDIM step (arXiv 2010.02502, Eq. 12 with eta = 0).

Each prediction is split into the data and the noise that it implies, and the two are mixed again at the next level:
x_next = alpha_next * x0 + sigma_next * eps. On a flow process that is Euler's step of the rectified flow exactly;
nothing else depends on the process or on the prediction. Schedules are in clocks.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser
from .noise import add_noise, alpha_sigma
from .predictions import to_x0_eps


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    log_snrs: Tensor,
    null_conditioning: Conditioning | None = None,
    guidance_scale: float = 1.0,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Latents x0 (b, c, h, w) in float32 from unit noise (b, c, h, w).

    ``log_snrs`` (steps + 1,) increases; the first level may be -inf and the last is normally +inf. A guidance scale
    of 1 is none; any other needs ``null_conditioning``. ``callback(step, steps, x0)`` sees each step's estimate,
    steps counted from 1. ValueError for a schedule that does not increase or a null conditioning that is missing.
    """
    check_schedule(log_snrs)
    if guidance_scale != 1.0 and null_conditioning is None:
        raise ValueError(f"Got a guidance scale of {guidance_scale} without a null conditioning to guide away from.")
    steps, levels = len(log_snrs) - 1, log_snrs.to(noise.device, torch.float32)
    x_t = initial(denoiser.process, noise, levels[0])
    for step in range(steps):
        log_snr, next_log_snr = (level.expand(len(noise)) for level in levels[step : step + 2])
        pred = guided(denoiser, x_t, log_snr, conditioning, null_conditioning, guidance_scale)
        x0, eps = to_x0_eps(denoiser.prediction, pred, denoiser.process, x_t, log_snr)
        x_t = add_noise(denoiser.process, x0, eps, next_log_snr)
        if callback is not None:
            callback(step + 1, steps, x0)
    return x_t


def initial(process: str, noise: Tensor, log_snr: Tensor) -> Tensor:
    """Where sampling begins: noise with the spread that latents of unit variance have at ``log_snr``."""
    alpha, sigma = alpha_sigma(process, log_snr)
    return noise * torch.hypot(alpha, sigma)


def guided(
    denoiser: Denoiser,
    x_t: Tensor,
    log_snr: Tensor,
    conditioning: Conditioning,
    null_conditioning: Conditioning | None,
    guidance_scale: float,
) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): null + scale * (conditional - null)."""
    conditional = denoiser(x_t, log_snr, conditioning)
    if null_conditioning is None or guidance_scale == 1.0:
        return conditional
    return torch.lerp(denoiser(x_t, log_snr, null_conditioning), conditional, guidance_scale)


def check_schedule(log_snrs: Tensor) -> None:
    """ValueError unless ``log_snrs`` (steps + 1,) increases from noise to data."""
    if log_snrs.ndim != 1 or len(log_snrs) < 2 or not bool((log_snrs[1:] > log_snrs[:-1]).all()):
        raise ValueError(
            f"Got a schedule of log_snr {log_snrs.tolist()}: expected at least two levels that increase, from noise "
            "(low) to data (high)."
        )
