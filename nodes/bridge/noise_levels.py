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

Unit noise z in our coordinates, from which one-step students draw, is in ComfyUI's x: z of flows, but (1 + 7 sigma) z
of HiDream-O1; sqrt(sigma_data^2 + sigma^2) z of ``ve``, but (1 + sigma) z of Cosmos-Predict2; z of ``vp``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ...training.clocks import FLOW_RANGE, LOG_SNR, TIME, AngleClock, Clock, DiscreteClock, EDMClock, FlowClock
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
    """The model's own time: a flow's as diffusers' hosts count it, without its shift; else what the network is told.

    ValueError where that is none that we know, as of samplings that other node packs make.
    """
    levels, kinds = levels_of(sampling), [kind.__name__ for kind in type(sampling).__mro__]
    if levels.kind.counted == "flow":
        return flow_clock(levels)
    clock = next((make for kind, make in CLOCKS.items() if kind in kinds), None)
    if clock is None:
        raise ValueError(
            f"this model's times ({', '.join(kinds[:3])}) are none that we know, and a student has to be called at "
            f"one: expected a flow, or one of {', '.join(CLOCKS)}"
        )
    return clock(sampling, levels)


def flow_clock(levels: NoiseLevels) -> FlowClock:
    """What ComfyUI calls sigma; where its noise is louder than the data, that is not the level that others mean."""
    if levels.noise_scale == 1:
        return FlowClock()
    low, high = (end + timestep_shift(levels.noise_scale) for end in FLOW_RANGE)
    return FlowClock(log_snr_range=(low, high), spread=levels.noise_scale, unit=LOG_SNR)


def cosmos_clock(sampling: Any, levels: NoiseLevels) -> FlowClock:
    data, noise = (float(sigma) / (1 + float(sigma)) for sigma in (sampling.sigma_min, sampling.sigma_max))
    return FlowClock(log_snr_range=levels.log_snr_range, within=(data, noise), unit=LOG_SNR)


def angle_clock(sampling: Any, levels: NoiseLevels) -> AngleClock:
    return AngleClock(levels.log_snr_range)


def edm_clock(sampling: Any, levels: NoiseLevels) -> EDMClock:
    return EDMClock(float(sampling.sigma_min), float(sampling.sigma_max), levels.data_scale)


def table_clock(sampling: Any, levels: NoiseLevels) -> DiscreteClock:
    """Where the network is told no index of the table (the "lcm" of ModelSamplingDiscrete), one says nothing."""
    sigmas = sampling.sigmas.double().cpu()
    told = sampling.timestep(sampling.sigmas[-1:]).tolist() == [len(sigmas) - 1]
    return DiscreteClock(1 / (1 + (sigmas / levels.data_scale).square()), unit=TIME if told else LOG_SNR)


# By the class that a ``model_sampling`` is mixed from, most special first.
CLOCKS: dict[str, Callable[[Any, NoiseLevels], Clock]] = {
    "ModelSamplingCosmosRFlow": cosmos_clock,
    "ModelSamplingContinuousV": angle_clock,
    "ModelSamplingContinuousEDM": edm_clock,
    "ModelSamplingDiscrete": table_clock,
}
