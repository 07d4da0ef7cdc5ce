"""FineStyle's bottleneck (:mod:`...training.bottleneck`) behind a layer of a MODEL, as training computes it."""

import torch
from torch import Tensor, nn

from ...training.bottleneck import bottleneck
from ...training.formats.layers import Layer
from ...training.formats.metadata import AdapterMetadata
from .patch_terms import Place
from .terms import Term, is_convolution


class Bottleneck(Term):
    """What one layer's bottleneck adds. Its strength is in the up-projection."""

    @classmethod
    def of_layer(
        cls, layer: Layer, place: Place, about: AdapterMetadata, family: str, strength: float, dtype: torch.dtype
    ) -> "Bottleneck":
        up = strength * layer.scale * layer.tensors["bottleneck_up"].float()
        return cls({"down": layer.tensors["bottleneck_down"].float(), "up": up}, dtype)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        factors = self.beside(y)
        return bottleneck(y, factors["down"], factors["up"], 1 if is_convolution(layer) else -1)
