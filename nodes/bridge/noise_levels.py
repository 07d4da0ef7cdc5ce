"""ComfyUI's noise levels in our coordinate: which process and prediction a model has, and sigma for a log_snr.

Ours is log(alpha^2 / sigma^2) over data and noise of unit variance. ComfyUI's ``sigma`` and ``x`` are counted in one
of three ways, and where its latents or its noise have another spread, that is taken out first:

``flow``  x = (1 - sigma) * x0 + sigma * noise: SD3, FLUX and their kin. HiDream-O1's noise has a spread of 8, which in
          log_snr is an addition, as every shift of a flow is.
``ve``    x = x0 + sigma * noise, which the model divides by sqrt(sigma_data^2 + sigma^2) inside: that is where its own,
          variance preserving, coordinates are. With x0 and sigma in units of sigma_data (0.5 for Playground 2.5 and
          Cosmos) EDM's output (arXiv 2206.00364, Eq. 7) is -v: F = sigma * x0 - alpha * eps. Cosmos-Predict2 divides by
          1 + sigma instead, and is a flow in t = sigma / (1 + sigma).
``vp``    x = alpha * x0 + sqrt(1 - alpha^2) * noise with sigma = sqrt(1 - alpha^2) / alpha: CogVideoX.
"""

import math
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ...training.clocks import Clock, DiscreteClock, EDMClock, FlowClock
from ...training.noise import alpha_sigma, expand, log_snr_of_time, timestep_shift


@dataclass(frozen=True)
class Kind:
    """A class that ``model_sampling`` is mixed from, in our words and in ComfyUI's."""

    process: str
    prediction: str
    counted: str  # "flow", "ve" or "vp": what ComfyUI's sigma and x mean


# Most special first. EDM's sign does not change a loss, and ComfyUI's answer is the data whatever the network's is.
TRAINABLE = {
    "CONST": Kind("flow", "flow", "flow"),
    "COSMOS_RFLOW": Kind("flow", "flow", "ve"),
    "X0": Kind("vp", "x0", "ve"),
    "EDM": Kind("vp", "v", "ve"),
    "V_PREDICTION_DDPM": Kind("vp", "v", "vp"),
    "V_PREDICTION": Kind("vp", "v", "ve"),
    "EPS": Kind("vp", "eps", "ve"),
}
NO_NOISE_RELATION = ("IMG_TO_IMG", "IMG_TO_IMG_FLOW")


@dataclass(frozen=True)
class NoiseLevels:
    """How one model counts noise."""

    kind: Kind
    log_snr_range: tuple[float, float]
    data_scale: float = 1.0  # standard deviation of ComfyUI's latents; ours are divided by it
    noise_scale: float = 1.0  # standard deviation of ComfyUI's noise, in a flow

    @property
    def process(self) -> str:
        return self.kind.process

    @property
    def prediction(self) -> str:
        return self.kind.prediction

    def sigma(self, log_snr: Tensor) -> Tensor:
        """ComfyUI's sigma (b,) for log_snr (b,), float32."""
        if self.kind.counted == "flow":
            return torch.sigmoid((timestep_shift(self.noise_scale) - log_snr.float()) / 2)
        return self.data_scale * torch.exp(-log_snr.float() / 2)

    def log_snr(self, sigma: Tensor) -> Tensor:
        """The inverse of :meth:`sigma`, in float32. A sigma of 0 gives +inf, and a flow's of 1 gives -inf."""
        if self.kind.counted == "flow":
            return log_snr_of_time(sigma) + timestep_shift(self.noise_scale)
        return 2 * math.log(self.data_scale) - 2 * sigma.float().log()

    def comfy_input(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """Our x_t (b, c, ...) at log_snr (b,) as ComfyUI's x."""
        if self.kind.counted == "ve":
            alpha, _ = alpha_sigma(self.process, log_snr)
            return x_t * expand(self.data_scale / alpha, x_t)
        if self.noise_scale != 1.0:
            return x_t * expand(1 + (self.noise_scale - 1) * self.sigma(log_snr), x_t)
        return x_t


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
    kind, stated = TRAINABLE[known[0]], vars(sampling)
    if kind.counted == "flow":
        return NoiseLevels(kind, (-math.inf, math.inf), noise_scale=float(stated.get("noise_scale", 1.0)))
    scale = float(stated.get("sigma_data", 1.0)) if known[0] != "COSMOS_RFLOW" else 1.0
    low, high = (-2 * math.log(float(sigma) / scale) for sigma in (sampling.sigma_max, sampling.sigma_min))
    return NoiseLevels(kind, (low, high), data_scale=scale)


def clock_of(sampling: Any) -> Clock:
    """The model's own time, as diffusers' hosts count it: a flow's without its shift. ValueError where it has none."""
    levels, kinds = levels_of(sampling), [kind.__name__ for kind in type(sampling).__mro__]
    if levels.kind.counted == "flow" and levels.noise_scale == 1:
        return FlowClock()
    if "ModelSamplingDiscrete" in kinds:
        return DiscreteClock(1 / (1 + (sampling.sigmas.double().cpu() / levels.data_scale).square()))
    if "ModelSamplingContinuousEDM" in kinds and levels.data_scale == 1 and levels.kind.process == "vp":
        return EDMClock(float(sampling.sigma_min), float(sampling.sigma_max))
    raise ValueError(
        f"this model counts its noise in a way ({kinds[0]}) that a student's file cannot state: distillation is for "
        "flows such as FLUX, SD3 and Qwen-Image, and for models with a table of noise levels such as SD1.5 and SDXL"
    )
