"""What a network predicts, as a pair of coefficients: prediction = a * x0 + b * eps.

Together with x_t = alpha * x0 + sigma * eps that is a 2x2 system, and its solution

    D = alpha * b - sigma * a,    x0 = (b * x_t - sigma * prediction) / D,    eps = (alpha * prediction - a * x_t) / D

turns any prediction into any other, for every process.
"""

import torch
from torch import Tensor

from .noise import alpha_sigma, expand, wide

# D vanishes for "eps" where alpha does and for "x0" where sigma does. The side that the network did not predict is
# undetermined there: bounding both coefficients keeps it finite, and leaves the predicted side exact.
SMALLEST_COEFFICIENT = 1e-6


def x0(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The data."""
    return torch.ones_like(alpha), torch.zeros_like(sigma)


def eps(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The unit noise. DDPM (arXiv 2006.11239)."""
    return torch.zeros_like(alpha), torch.ones_like(sigma)


def v(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """alpha * eps - sigma * x0. Progressive distillation (arXiv 2202.00512)."""
    return -sigma, alpha


def flow(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity eps - x0. Rectified flow (arXiv 2209.03003)."""
    return -torch.ones_like(alpha), torch.ones_like(sigma)


def coefficients(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of a prediction, shaped like ``alpha`` and ``sigma``. ValueError for an unknown prediction."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"Unknown prediction {prediction!r}: expected one of {', '.join(PREDICTIONS)}.")
    return PREDICTIONS[prediction](alpha, sigma)


def target(prediction: str, process: str, x0: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """What the network should answer, (b, ...) in float32, for data and noise (b, ...) mixed at log_snr (b,)."""
    a, b = coefficients(prediction, *alpha_sigma(process, log_snr))
    return expand(a, x0) * wide(x0) + expand(b, x0) * wide(eps)


def to_x0_eps(prediction: str, pred: Tensor, process: str, x_t: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """The data and the noise, (b, ...) in float32, that a prediction ``pred`` (b, ...) at x_t implies."""
    alpha, sigma = (bounded(part) for part in alpha_sigma(process, log_snr))
    a, b = coefficients(prediction, alpha, sigma)
    determinant = alpha * b - sigma * a
    by_x_t, by_pred = expand(b / determinant, x_t), expand(-sigma / determinant, x_t)
    data = by_x_t * wide(x_t) + by_pred * wide(pred)
    by_x_t, by_pred = expand(-a / determinant, x_t), expand(alpha / determinant, x_t)
    return data, by_x_t * wide(x_t) + by_pred * wide(pred)


def bounded(coefficient: Tensor) -> Tensor:
    """alpha or sigma, at least ``SMALLEST_COEFFICIENT``."""
    return coefficient.clamp(min=SMALLEST_COEFFICIENT)


def convert(pred: Tensor, source: str, target: str, process: str, x_t: Tensor, log_snr: Tensor) -> Tensor:
    """The same answer of a network expressed as another prediction, (b, ...) in float32."""
    data, noise = to_x0_eps(source, pred, process, x_t, log_snr)
    a, b = coefficients(target, *alpha_sigma(process, log_snr))
    return expand(a, x_t) * data + expand(b, x_t) * noise


PREDICTIONS = {"x0": x0, "eps": eps, "v": v, "flow": flow}
