"""StyleInject (:mod:`...training.style_inject`) at a layer of a MODEL, as training computes it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...training.adapters.text_tokens import counted_tokens, reads_text
from ...training.formats.layers import Layer
from ...training.formats.metadata import AdapterMetadata
from ...training.style_inject import Factors, style_injected
from .patch_terms import Place
from .terms import Term, is_convolution


class StyleInject(Term):
    """What the branches of one layer add. Its strength is in the up-projection, for it counts once in every form."""

    def __init__(self, tensors: dict[str, Tensor], form: str, family: str, reads: bool, dtype: torch.dtype) -> None:
        super().__init__(tensors, dtype)
        self.form, self.family, self.reads_text = form, family, reads
        self.observe: Callable[[Tensor, Tensor], None] | None = None  # gets the input, and what is added to the output

    @classmethod
    def of_layer(
        cls, layer: Layer, place: Place, about: AdapterMetadata, family: str, strength: float, dtype: torch.dtype
    ) -> "StyleInject":
        """ValueError where the file does not say the form."""
        if "injection" not in about.options:
            raise ValueError("the adapter does not say how it acts: its metadata are damaged. Copy or train it again")
        tensors = {name.removeprefix("styleinject_"): tensor.float() for name, tensor in layer.tensors.items()}
        tensors = {
            "a": tensors["A"],
            "b": strength * layer.scale * tensors["B"],
            "router": tensors["R"],
            "router_bias": tensors["r"],
        }
        return cls(tensors, about.options["injection"], family, reads_text(place.layer), dtype)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        convolve = partial(_convolve, layer) if is_convolution(layer) else None
        counted = counted_tokens(x, self.family) if self.reads_text else None
        factors = Factors(**self.beside(x))
        added, _ = style_injected(x, y, factors, self.form, convolve=convolve, counted=counted)
        if self.observe is not None:
            self.observe(x, added)
        return added.to(y.dtype)


def _convolve(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return layer._conv_forward(x, weight, None)  # with its stride and its padding, of whatever mode
