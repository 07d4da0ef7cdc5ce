"""From noise to data in one evaluation of a distilled generator, or in a few.

A one-step generator is a network f that learned to answer pure noise z at one fixed time of its teacher's clock
(SwiftBrush, arXiv 2312.05239; DMD2, arXiv 2405.14867). With f = a * x0 + b * eps that is

    x_t = z,    x0 = (b * z - sigma * f(z, t)) / (alpha * b - sigma * a)

and z has unit variance whatever the time is. A sampler that begins with sigma * z feeds the wrong scale, unless the
time is the teacher's last. Some generators (SiD-LSG, arXiv 2406.01561) did learn from sigma * z: ``scaled``.

A few steps noise the answer again, at the next level:

    x_t' = alpha' * x0 + sigma' * (g * fresh + sqrt(1 - g^2) * eps),    eps = (x_t - alpha * x0) / sigma

``fresh``      g = 1: consistency models (arXiv 2303.01469, Algorithm 1), LCM, DMD2;
``ancestral``  g^2 = 1 - SNR / SNR', the posterior of the process (DDPM's step, Euler ancestral): the Turbo models;
``implied``    g = 0, DDIM's step and Euler's of a flow: those that were distilled along their teacher's path
               (Lightning, FLUX.1-schnell).

From a given picture the first input is what the process makes of it, x_t = alpha * given + sigma * z.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser
from .noise import add_noise, alpha_sigma, expand, wide
from .predictions import bounded, coefficients, to_x0_eps
from .randomness import generator

Answer = Callable[[Tensor, Tensor], Tensor]
"""x0 (b, ...) for x_t (b, ...) at log_snr (b,): a generator with its conditioning."""

UNIT, SCALED = "unit", "scaled"
FRESH, ANCESTRAL, IMPLIED = "fresh", "ancestral", "implied"


def x0_of(prediction: str, pred: Tensor, process: str, x_t: Tensor, log_snr: Tensor) -> Tensor:
    """The data (b, ...) that a prediction ``pred`` at x_t (b, ...) and log_snr (b,) implies, at least in float32."""
    return to_x0_eps(prediction, pred, process, x_t, log_snr)[0]


def amplification(prediction: str, process: str, log_snr: Tensor) -> Tensor:
    """How many times an error of the prediction counts in x0: |sigma / (alpha b - sigma a)|, shaped like ``log_snr``.

    1 / alpha of what predicts noise, times sigma: 14.6 at the last time of SD1.5, 157 at PixArt's. bfloat16 rounds a
    prediction of 1 by up to 0.004, so the network's own arithmetic wants float32 there.
    """
    alpha, sigma = (bounded(part) for part in alpha_sigma(process, log_snr))
    a, b = coefficients(prediction, alpha, sigma)
    return (sigma / (alpha * b - sigma * a)).abs()


def first_input(process: str, noise: Tensor, log_snr: Tensor, given: Tensor | None = None, start: str = UNIT) -> Tensor:
    """What a generator is fed first, (b, ...), from unit noise (b, ...) at log_snr (b,).

    ``given`` (b, ...): the data to begin from; None = none. ValueError for an unknown ``start``.
    """
    if start not in (UNIT, SCALED):
        raise ValueError(f"Unknown start {start!r}: expected {UNIT} or {SCALED}.")
    if given is not None:
        return add_noise(process, given, noise, log_snr)
    return wide(noise) if start == UNIT else expand(alpha_sigma(process, log_snr)[1], noise) * wide(noise)


def renoised(
    process: str,
    x_t: Tensor,
    x0: Tensor,
    log_snr: Tensor,
    next_log_snr: Tensor,
    fresh: Tensor,
    *,
    between: str = FRESH,
) -> Tensor:
    """The next input (b, ...): x0 noised to ``next_log_snr`` (b,).

    ``between`` says how much of the noise is ``fresh`` unit noise (b, ...), and how much x_t and x0 imply. ValueError
    for an unknown one.
    """
    if between not in SHARES:
        raise ValueError(f"Unknown noise between steps {between!r}: expected one of {', '.join(SHARES)}.")
    if between == FRESH:  # without what is implied, which need not be finite
        return add_noise(process, x0, fresh, next_log_snr)
    alpha, sigma = (expand(part, x_t) for part in alpha_sigma(process, log_snr))
    implied = (wide(x_t) - alpha * wide(x0)) / sigma
    share = expand(SHARES[between](log_snr, next_log_snr), x_t)
    eps = share.sqrt() * wide(fresh) + (1 - share).sqrt() * implied
    return add_noise(process, x0, eps, next_log_snr)


def fresh_noise(noise: Tensor, seed: int, step: int) -> Tensor:
    """Unit noise (b, ...) for the input of a step after the first, on the device of the first ``noise`` (b, ...).

    Each sample's is a function of the seed, the step and its own first noise, so that a picture is the same alone, in
    a batch, and on another device.
    """
    rows = [
        torch.randn(row.shape, generator=generator(seed, "renoise", step, *row.flatten()[:8].tolist())) for row in noise
    ]
    return torch.stack(rows).to(noise)


@torch.no_grad()
def generate(
    answer: Answer,
    first: Tensor,
    noise: Tensor,
    *,
    process: str,
    log_snrs: Tensor,
    seed: int = 0,
    between: str = FRESH,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Data (b, ...) in one evaluation for each of the ``log_snrs`` (steps,), which increase.

    ``first`` is the first input (:func:`first_input`) and ``noise`` the unit noise that it was made from, both
    (b, ...). ``callback(step, x_t, x0)`` sees each step, counted from 0. ValueError for levels that do not increase.
    """
    check_levels(log_snrs)
    x_t, x0 = first, first
    for step, level in enumerate(log_snrs):
        log_snr = level.expand(len(x_t))
        x0 = answer(x_t, log_snr)
        if callback is not None:
            callback(step, x_t, x0)
        if step + 1 < len(log_snrs):
            fresh = fresh_noise(noise, seed, step + 1)
            next_log_snr = log_snrs[step + 1].expand(len(x_t))
            x_t = renoised(process, x_t, x0, log_snr, next_log_snr, fresh, between=between)
    return x0


def answer_of(denoiser: Denoiser, conditioning: Conditioning) -> Answer:
    """A denoiser of any prediction as a generator of data."""

    def answer(x_t: Tensor, log_snr: Tensor) -> Tensor:
        pred = denoiser(x_t, log_snr, conditioning)
        return x0_of(denoiser.prediction, pred, denoiser.process, x_t, log_snr)

    return answer


def inpainting(answer: Answer, process: str, given: Tensor, noise: Tensor, mask: Tensor) -> Answer:
    """Draws where ``mask`` is 1 and keeps ``given`` where it is 0; all three (b, ...) or broadcasting to it.

    The generator sees ``given`` noised to its level by ``noise`` outside of the mask.
    """

    def inpaint(x_t: Tensor, log_snr: Tensor) -> Tensor:
        known = add_noise(process, given, noise, log_snr)
        return torch.lerp(wide(given), answer(torch.lerp(known, wide(x_t), mask), log_snr), mask)

    return inpaint


def check_levels(log_snrs: Tensor) -> None:
    """ValueError unless ``log_snrs`` (steps,) are at least one, and increase from noise to data."""
    if log_snrs.ndim != 1 or len(log_snrs) < 1 or not bool((log_snrs < math.inf).all()):
        raise ValueError(f"Got noise levels of log_snr {log_snrs.tolist()}: expected at least one below infinity.")
    if not bool((log_snrs[1:] > log_snrs[:-1]).all()):
        raise ValueError(
            f"Got noise levels of log_snr {log_snrs.tolist()}: expected them to increase, from noise (low) to data "
            "(high)."
        )


# g^2 for the log_snr (b,) of a step and of the next.
SHARES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    FRESH: lambda log_snr, next_log_snr: torch.ones_like(log_snr),
    ANCESTRAL: lambda log_snr, next_log_snr: -torch.expm1(log_snr - next_log_snr),
    IMPLIED: lambda log_snr, next_log_snr: torch.zeros_like(log_snr),
}
