"""A model with an adapter under a rule of four predictions: itself a denoiser, for any sampler."""

import torch
from torch import Tensor

from ..adapters.attach import Adapter
from ..denoiser import Conditioning, Denoiser
from ..guidance import Guidance, combined


class GuidedDenoiser:
    """``denoiser``, which has the ``adapter`` on it, guided. What a rule gives no weight is not predicted.

    ``null`` is the conditioning (b, …) of the null prompt, for batches of the same size.
    """

    def __init__(self, denoiser: Denoiser, adapter: Adapter, guidance: Guidance, null: Conditioning) -> None:
        self.family, self.module = denoiser.family, denoiser.module
        self.process, self.prediction = denoiser.process, denoiser.prediction
        self.log_snr_range = denoiser.log_snr_range
        self.denoiser, self.adapter, self.guidance, self.null = denoiser, adapter, guidance, null

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
