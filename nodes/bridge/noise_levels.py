"""ComfyUI's noise levels in our coordinate: which process and prediction a model has, and sigma for a log_snr.

ComfyUI's ``sigma`` means two things. A ``CONST`` model (SD3, FLUX and their kin) is a flow: x = (1 - sigma) * x0 +
sigma * eps. Everything else that we train sees x = x0 + sigma * eps ("variance exploding") and divides by
sqrt(1 + sigma^2) inside, which is where its own, variance preserving, coordinates are.
"""

import math
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ...training.noise import expand, log_snr_of_time

# The classes that a model's ``model_sampling`` is mixed from, most special first: (process, prediction).
TRAINABLE = {
    "CONST": ("flow", "flow"),
    "X0": ("vp", "x0"),
    "EDM": ("vp", "v"),
    "V_PREDICTION": ("vp", "v"),
    "EPS": ("vp", "eps"),
}
NO_NOISE_RELATION = ("IMG_TO_IMG", "IMG_TO_IMG_FLOW", "COSMOS_RFLOW", "V_PREDICTION_DDPM")


@dataclass(frozen=True)
class NoiseLevels:
    """How one model counts noise."""

    process: str
    prediction: str
    log_snr_range: tuple[float, float]

    def sigma(self, log_snr: Tensor) -> Tensor:
        """ComfyUI's sigma (b,) for log_snr (b,), float32."""
        if self.process == "flow":
            return torch.sigmoid(-log_snr.float() / 2)
        return torch.exp(-log_snr.float() / 2)

    def log_snr(self, sigma: Tensor) -> Tensor:
        """The inverse: log_snr (b,) of ComfyUI's sigma (b,), float32."""
        return log_snr_of_time(sigma) if self.process == "flow" else -2 * sigma.float().log()

    def comfy_input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Our x_t (b, c, ...) as ComfyUI's x at sigma (b,)."""
        if self.process == "flow":
            return x_t
        return x_t * expand((1 + sigma**2).sqrt(), x_t)


def noise_levels(model: comfy.model_patcher.ModelPatcher) -> NoiseLevels:
    """What ``model_sampling`` says, patches of it included (ModelSamplingSD3, ModelSamplingDiscrete, …).

    Raises ValueError for a model whose noise we cannot express.
    """
    return levels_of(model.get_model_object("model_sampling"))


def levels_of(sampling: Any) -> NoiseLevels:
    """The same of a ``model_sampling``."""
    kinds = [kind.__name__ for kind in type(sampling).__mro__]
    foreign = [kind for kind in NO_NOISE_RELATION if kind in kinds]
    known = [kind for kind in TRAINABLE if kind in kinds]
    if foreign or not known:
        raise ValueError(
            f"this model's noise ({', '.join(foreign or kinds)}) is not of a kind that can be trained: "
            f"expected one of {', '.join(TRAINABLE)}"
        )
    process, prediction = TRAINABLE[known[0]]
    if process == "flow":
        _refuse_scaled(vars(sampling).get("noise_scale", 1.0), "the noise")
        return NoiseLevels(process, prediction, (-math.inf, math.inf))
    _refuse_scaled(vars(sampling).get("sigma_data", 1.0), "the data")
    low, high = (-2 * math.log(float(sigma)) for sigma in (sampling.sigma_max, sampling.sigma_min))
    return NoiseLevels(process, prediction, (low, high))


def _refuse_scaled(scale: float, what: str) -> None:
    if float(scale) != 1.0:
        raise ValueError(f"this model scales {what} by {float(scale)}, which training does not support yet: expected 1")
