"""The passes of one batch through model and loss: what training repeats, and what a plan measures beforehand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.attach import Adapter
from ..denoiser import Conditioning, Denoiser
from ..losses import DCO, LOSSES, dco_beta, direct_consistency
from ..noise import add_noise
from ..predictions import target
from ..weightings import WEIGHTINGS
from .config import TrainConfig


@dataclass(frozen=True)
class Noised:
    """A batch and what was drawn for it, on the device."""

    x0: Tensor  # (b, c, h, w)
    log_snr: Tensor  # (b,)
    eps: Tensor  # (b, c, h, w)
    mask: Tensor | None  # (b, 1, h, w)
    conditioning: Conditioning  # (b, …)
    weights: Tensor | None = None  # (b,) factors on the losses; None = 1
    of_base: bool = False  # whether the target is what the model says without the adapter
    wanted: Tensor | None = None  # (b, c, h, w) what is learned, in the model's own prediction; None = x0 and eps say


def learn_from(
    batch: Noised, denoiser: Denoiser, adapter: Adapter, config: TrainConfig, source: torch.Generator
) -> Tensor:
    """Adds the batch's part of a step's gradient to the adapter; ``source`` draws dropout. Losses (b,)."""
    x_t = add_noise(denoiser.process, batch.x0, batch.eps, batch.log_snr)
    wanted = batch.wanted
    if wanted is None:
        wanted = target(denoiser.prediction, denoiser.process, batch.x0, batch.eps, batch.log_snr)
    with adapter.dropout(source):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            base = _without(adapter, denoiser, x_t, batch) if batch.of_base or config.loss == DCO else None
            prediction = denoiser(x_t, batch.log_snr, batch.conditioning)
        losses = _losses(prediction, wanted, base, batch, denoiser, config)
        losses = losses if batch.weights is None else losses * batch.weights
        (losses.mean() / config.accumulation).backward()
    return losses


def _losses(
    prediction: Tensor, wanted: Tensor, base: Tensor | None, batch: Noised, denoiser: Denoiser, config: TrainConfig
) -> Tensor:
    """Of each sample (b,), weighted by noise level. DCO's weight is within its beta, as in the objective that it is
    derived from (Diffusion-DPO, arXiv 2311.12908, Eq. 14), which has beta times the weight of the level."""
    weights = WEIGHTINGS[config.weighting](batch.log_snr, denoiser.prediction, denoiser.process)
    if base is not None and batch.of_base:
        wanted = base
    if base is None or config.loss != DCO:
        return LOSSES[config.loss](prediction, wanted, batch.mask) * weights
    beta = dco_beta(denoiser.process) if config.dco_beta is None else config.dco_beta
    return direct_consistency(prediction, wanted, base, beta * weights, batch.mask)


@torch.no_grad()
def _without(adapter: Adapter, denoiser: Denoiser, x_t: Tensor, batch: Noised) -> Tensor:
    """What the model answers without its adapter, (b, c, h, w): the target that preserves it, and DCO's measure."""
    with adapter.enabled(False):
        return denoiser(x_t, batch.log_snr, batch.conditioning)
