"""Optional weights of the loss by noise level: ``(log_snr (b,), prediction, process) -> (b,)``.

The papers state them for one prediction or another. Here each is stated as the weight of the squared error of *x0*,
or of eps or of the flow velocity where the paper has it so, and one factor carries it to the prediction that the
model makes. At a given x_t an error of x0 shows in the prediction a * x0 + b * eps with the factor D / sigma, where
D = alpha * b - sigma * a (see predictions.py).

Style-friendly sampling is unweighted ("none"): a weight would undo the law it draws from. A weighting that does
nothing for a prediction, or has no meaning there, is refused by :func:`check_weighting`.
"""

import math

import torch
from torch import Tensor

from .noise import alpha_sigma, time_of_log_snr, wide
from .predictions import coefficients

MIN_SNR_GAMMA = 5.0


def none(log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """1: the mean square of the model's own prediction."""
    return torch.ones_like(wide(log_snr))


def x0(log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """The mean square of x0, whatever the model predicts; what ComfyUI's own trainer minimises."""
    return from_x0(torch.ones_like(wide(log_snr)), log_snr, prediction, process)


def min_snr(log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """min(SNR, 5) on x0. Min-SNR (arXiv 2303.09556)."""
    return from_x0(wide(log_snr).exp().clamp(max=MIN_SNR_GAMMA), log_snr, prediction, process)


def soft_min_snr(log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """5 SNR / (SNR + 5) on x0: min-SNR without its corner. Hourglass Diffusion (arXiv 2401.11605)."""
    return from_x0(MIN_SNR_GAMMA * torch.sigmoid(wide(log_snr) - math.log(MIN_SNR_GAMMA)), log_snr, prediction, process)


def p2(log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """1 / (1 + SNR) on eps, P2 with k = gamma = 1 (arXiv 2204.00227); SNR / (1 + SNR) on x0."""
    return from_x0(torch.sigmoid(wide(log_snr)), log_snr, prediction, process)


def debiased(log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """1 / sqrt(SNR) on eps (arXiv 2310.08442); sqrt(SNR) on x0."""
    return from_x0(torch.exp(wide(log_snr) / 2), log_snr, prediction, process)


def inverse_square(log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """1 / t^2 on the flow velocity: almost everything on the last details. "sigma_sqrt" in diffusers."""
    require_flow("sigma", prediction, process)
    return time_of_log_snr(log_snr) ** -2


def cosmap(log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """2 / (pi (1 - 2 t + 2 t^2)) on the flow velocity. SD3 (arXiv 2403.03206, section 3.1)."""
    require_flow("cosmap", prediction, process)
    t = time_of_log_snr(log_snr)
    return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


def from_x0(weight: Tensor, log_snr: Tensor, prediction: str, process: str) -> Tensor:
    """A weight of the squared error of x0 as a weight of the squared error of ``prediction``: (sigma / D)^2 of it."""
    alpha, sigma = alpha_sigma(process, log_snr)
    a, b = coefficients(prediction, alpha, sigma)
    return weight * (sigma / (alpha * b - sigma * a)).square()


def require_flow(name: str, prediction: str, process: str) -> None:
    """ValueError unless the weighting ``name``, which is stated for rectified flow, is used for it."""
    if (prediction, process) != ("flow", "flow"):
        raise ValueError(
            f"The weighting {name!r} is defined for the flow velocity; this model predicts {prediction!r} on a "
            f"{process!r} process. Use 'none', or 'min-snr-5'."
        )


def check_weighting(name: str, prediction: str, process: str) -> None:
    """ValueError for an unknown weighting, and for one without meaning or effect for this prediction."""
    if name not in WEIGHTINGS:
        raise ValueError(f"Unknown weighting {name!r}: expected one of {', '.join(WEIGHTINGS)}.")
    weights = WEIGHTINGS[name](torch.linspace(-8, 8, 33, dtype=torch.float64), prediction, process)
    if name != "none" and bool(torch.isclose(weights, weights[:1], rtol=1e-6).all()):
        raise ValueError(
            f"The weighting {name!r} is the same at every noise level for a model that predicts {prediction!r} on a "
            f"{process!r} process, so that it has no effect: use 'none'."
        )


WEIGHTINGS = {
    "none": none,
    "min-snr-5": min_snr,
    "soft-min-snr": soft_min_snr,
    "p2": p2,
    "debiased": debiased,
    "x0": x0,
    "sigma": inverse_square,
    "cosmap": cosmap,
}
