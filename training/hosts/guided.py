"""A model with an adapter under a rule of four predictions: itself a denoiser, for any sampler."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.attach import Adapter
from ..denoiser import Conditioning, Denoiser
from ..guidance import Guidance, combined


@dataclass(frozen=True)
class GuidedDenoiser:
    """``denoiser``, which has the ``adapter`` on it, guided. What a rule gives no weight is not predicted.

    ``null`` is the conditioning (b, …) of the null prompt, for batches of the same size.
    """

    denoiser: Denoiser
    adapter: Adapter
    guidance: Guidance
    null: Conditioning

    @property
    def family(self) -> str:
        return self.denoiser.family

    @property
    def module(self) -> nn.Module:
        return self.denoiser.module

    @property
    def process(self) -> str:
        return self.denoiser.process

    @property
    def prediction(self) -> str:
        return self.denoiser.prediction

    @property
    def log_snr_range(self) -> tuple[float, float]:
        return self.denoiser.log_snr_range

    @torch.no_grad()
    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction (b, c, h, w) in float32 for x_t (b, c, h, w) at log_snr (b,)."""
        weights = self.guidance.weights
        predictions: list[Tensor | None] = []
        for adapted in (True, False):
            for asked in (conditioning, self.null):
                needed = weights[len(predictions)] != 0
                with self.adapter.enabled(adapted):
                    predictions.append(self.denoiser(x_t, log_snr, asked) if needed else None)
        return combined(weights, predictions)
