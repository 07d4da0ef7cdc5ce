"""The passes of one batch through model and loss: what training repeats, and what a plan measures beforehand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.attach import Adapter
from ..denoiser import Conditioning, Denoiser
from ..losses import LOSSES
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


def learn_from(
    batch: Noised, denoiser: Denoiser, adapter: Adapter, config: TrainConfig, source: torch.Generator
) -> Tensor:
    """Adds the batch's part of a step's gradient to the adapter; ``source`` draws dropout. Losses (b,)."""
    x_t = add_noise(denoiser.process, batch.x0, batch.eps, batch.log_snr)
    wanted = target(denoiser.prediction, denoiser.process, batch.x0, batch.eps, batch.log_snr)
    with adapter.dropout(source):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            if batch.of_base:
                wanted = _without(adapter, denoiser, x_t, batch)
            prediction = denoiser(x_t, batch.log_snr, batch.conditioning)
        losses = LOSSES[config.loss](prediction, wanted, batch.mask)
        losses = losses * WEIGHTINGS[config.weighting](batch.log_snr, denoiser.prediction, denoiser.process)
        losses = losses if batch.weights is None else losses * batch.weights
        (losses.mean() / config.accumulation).backward()
    return losses


@torch.no_grad()
def _without(adapter: Adapter, denoiser: Denoiser, x_t: Tensor, batch: Noised) -> Tensor:
    """What the model answers without its adapter, (b, c, h, w): the target that preserves it."""
    with adapter.enabled(False):
        return denoiser(x_t, batch.log_snr, batch.conditioning)
