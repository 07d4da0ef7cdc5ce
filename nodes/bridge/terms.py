"""What an adapter adds to a layer's output, where ComfyUI adds something to its weight.

(W + dW) x + b = (W x + b) + dW x, so an adapter can come and go from one call of the model to the next with no weight
touched: of the base, in whatever form it is stored (float8, GGUF, offloaded), only inputs and outputs are seen. dW x is
computed from the adapter's own small factors. dW itself is formed only for LoHa and for Kronecker products on
convolutions, and only for the time of a call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...training.formats.layers import Layer, product
from .differentiable import ordinary


class Term(nn.Module):
    """What one patch adds to one layer. Its strength is part of its tensors."""

    reads_text = False  # whether it has to know which tokens of a prompt are its own

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            # Parameters, which ComfyUI moves with the model; and made where a gradient may pass through them.
            with torch.inference_mode(False):
                self.register_parameter(name, nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=False))

    def beside(self, like: Tensor) -> dict[str, Tensor]:
        """The tensors in the type and on the device of ``like``, where they are unless the model was moved alone."""
        found = {name: tensor.to(like.device, like.dtype) for name, tensor in self.named_parameters(recurse=False)}
        if torch.is_grad_enabled():
            found = {name: ordinary(tensor) if tensor.is_inference() else tensor for name, tensor in found.items()}
        return found

    def before(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What is added to the layer's input, of the shape of ``x``; None = nothing."""
        return None

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """What is added to the layer's output, of the shape of ``y``; None = nothing. ``x``: the input as it came."""
        return None


class LowRank(Term):
    """LoRA: B (A x) with ``a`` (r, in[, k, k]) and ``b`` (out, r)."""

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        factors = self.beside(x)
        return on_channels(factors["b"], multiply(layer, x, factors["a"]), layer)


class Kronecker(Term):
    """LoKr on a linear layer: (W1 (x) W2) x with ``first`` (a, c) and ``second`` (b, d) or its factors, in = cd."""

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        factors = self.beside(x)
        inner = x.unflatten(-1, (factors["first"].shape[1], -1))
        for name in ("second", "second_b", "second_a"):
            inner = F.linear(inner, factors[name]) if name in factors else inner
        return torch.einsum("ac,...cb->...ab", factors["first"], inner).flatten(-2)


class Product(Term):
    """A weight made anew each time from its factors: LoHa, and LoKr on a convolution."""

    def __init__(self, factors: Layer, dtype: torch.dtype) -> None:
        super().__init__(dict(factors.tensors), dtype)
        self.method, self.scale = factors.method, factors.scale

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return multiply(layer, x, product(Layer(self.method, self.beside(x), self.scale)))


class Dense(Term):
    """A whole difference of weights: ``weight`` (out, in[, k, k])."""

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return multiply(layer, x, self.beside(x)["weight"])


class Bias(Term):
    """A difference of biases: ``bias`` (out,)."""

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return across(self.beside(y)["bias"], y, layer).expand_as(y)


class Outputs(Term):
    """A rotation of outputs, (R - 1) W x with ``rows`` = R - 1 (out, out), and the layer's ``bias`` if it has one."""

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        tensors = self.beside(y)
        return on_channels(tensors["rows"], without_bias(tensors, y, layer), layer)


class Inputs(Term):
    """A rotation of inputs, W A1 (A2 x), and what else the term ``inner`` adds: GLoRA, which our OFT is written as."""

    def __init__(self, tensors: dict[str, Tensor], inner: Term | None, dtype: torch.dtype) -> None:
        super().__init__(tensors, dtype)
        self.inner = inner

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        factors = self.beside(x)
        return on_channels(factors["a1"], on_channels(factors["a2"], x, layer), layer)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        return self.inner.after(layer, x, y) if self.inner is not None else None


class Decomposed(Term):
    """DoRA as ComfyUI applies it (training/formats/styles.py): W becomes m / |W| (W + dW), by output rows.

    ``ratio`` (out,) is m / |W|, ``bias`` the layer's if it has one; ``strength`` is the part of the way that is gone.
    """

    def __init__(self, inner: Term, tensors: dict[str, Tensor], strength: float, dtype: torch.dtype) -> None:
        super().__init__(tensors, dtype)
        self.inner, self.strength = inner, strength

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        tensors = self.beside(y)
        ratio = across(tensors["ratio"], y, layer)
        changed = (ratio - 1) * without_bias(tensors, y, layer)
        added = self.inner.after(layer, x, y)
        return self.strength * (changed if added is None else changed + ratio * added)


def multiply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer like this one, with another weight and no bias, makes of ``x``."""
    if not is_convolution(layer):
        return F.linear(x, weight.flatten(1))
    weight = weight.reshape(len(weight), layer.in_channels // layer.groups, *layer.kernel_size)
    return layer._conv_forward(x, weight, None)  # with its stride and its padding, of whatever mode


def on_channels(matrix: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    """A matrix (n, m) times the channels of ``x``: its last dimension, in convolutions the second."""
    if is_convolution(layer):
        return F.linear(x.movedim(1, -1), matrix.flatten(1)).movedim(-1, 1)
    return F.linear(x, matrix.flatten(1))


def across(values: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
    """Values (out,) in a shape that broadcasts over ``y``."""
    return values.reshape(-1, *[1] * (y.ndim - 2)) if is_convolution(layer) else values


def without_bias(tensors: dict[str, Tensor], y: Tensor, layer: nn.Module) -> Tensor:
    return y - across(tensors["bias"], y, layer) if "bias" in tensors else y


def is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
