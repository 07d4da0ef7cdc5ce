"""Frozen layers that keep nothing of their weights for the backward pass.

A layer whose weights are stored in another type than it computes in (float8, a quantised form, float32 under
autocast), on another device, or with patches that are applied on the fly, makes a fresh weight in every call.
autograd keeps each of them until the backward pass: a second copy of the model. Worse, a host that streams weights
through one buffer has overwritten it by then, and gradients are silently wrong.

The gradient of y = W x + b by x is W^T dy: it needs neither x nor y, and W can be had again. So a call keeps nothing
at all, and the backward pass asks the host for one weight at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input
from torch.utils.checkpoint import checkpoint as recompute_later

from .sharding import whole

INPUT_GRADIENTS = {nn.Conv1d: conv1d_input, nn.Conv2d: conv2d_input, nn.Conv3d: conv3d_input}


@dataclass(frozen=True)
class Dense:
    """What a layer computes with, as plain numbers of one type on one device."""

    weight: Tensor  # (o, i) or (o, i / groups, *kernel)
    bias: Tensor | None  # (o,)


class Weights(Protocol):
    """How a host stores the weights of its layers."""

    def as_stored(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a call with such an input uses the stored weight itself: then there is nothing to save."""
        ...

    def is_product(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is known to compute W x + b and nothing else, as a linear layer or a convolution."""
        ...

    def dense(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Dense]:
        """What the layer computes with, patches included. Good inside only: the memory may be a shared buffer."""
        ...

    def device(self, layer: nn.Module) -> torch.device:
        """Where the layer computes."""
        ...


class PlainWeights:
    """Weights of ordinary modules: they are what they say they are."""

    def as_stored(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
        weight = layer.get_parameter("weight")
        return is_plain(weight) and weight.dtype == dtype and weight.device == device and not weight.is_inference()

    def is_product(self, layer: nn.Module) -> bool:
        return type(layer) in (nn.Linear, *INPUT_GRADIENTS)

    def dense(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Dense]:
        bias = whole(layer.get_parameter("bias")) if layer.bias is not None else None
        weight = whole(layer.get_parameter("weight")).detach()
        return nullcontext(Dense(weight.to(device, dtype), None if bias is None else bias.detach().to(device, dtype)))

    def device(self, layer: nn.Module) -> torch.device:
        return layer.get_parameter("weight").device


PLAIN = PlainWeights()


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a matrix of numbers to calculate with: no packed or quantised form, no float8."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1


@contextmanager
def frozen_products(module: nn.Module, weights: Weights = PLAIN) -> Iterator[None]:
    """Inside, the linear layers and convolutions of ``module`` keep nothing of a weight that they have to make.

    A call that uses the weight as it is stored, needs no gradient, or trains the layer itself is left to torch. Layers
    that an outer block holds already stay as they are. The backward pass belongs inside, too.
    """
    with ExitStack() as stack:
        for layer in module.modules():
            before = vars(layer).get("forward")
            if is_multiplying(layer) and not isinstance(before, FrozenForward):
                layer.forward = FrozenForward(layer, layer.forward, weights, known=before is None)
                stack.callback(_put_back, layer, before)
        yield


def is_multiplying(layer: nn.Module) -> bool:
    """A linear layer or a convolution, also one that stands in for it when weights are quantised, without parts."""
    sized = {"in_features", "out_features"} <= vars(layer).keys()
    return (sized or isinstance(layer, tuple(INPUT_GRADIENTS))) and not any(layer.children())


def host_of(layer: nn.Module) -> Weights:
    """Who knows the weights of a layer: inside :func:`frozen_products` its host, else the layer itself."""
    forward = vars(layer).get("forward")
    return forward.weights if isinstance(forward, FrozenForward) else PLAIN


def is_readable(layer: nn.Module) -> bool:
    """Whether :func:`dense_weight` knows how."""
    weight = layer.get_parameter("weight")
    return host_of(layer).is_product(layer) or (type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point())


def dense_weight(layer: nn.Module) -> Tensor:
    """A layer's weight as it computes with it, in float32 where it computes: a copy, for this one layer."""
    host = host_of(layer)
    with torch.no_grad(), host.dense(layer, torch.float32, host.device(layer)) as dense:
        return dense.weight.clone()


def _put_back(layer: nn.Module, before: Callable | None) -> None:
    del layer.forward
    if before is not None:
        layer.forward = before


class FrozenForward:
    """A layer's ``forward`` that leaves no weight behind."""

    def __init__(self, layer: nn.Module, forward: Callable, weights: Weights, *, known: bool) -> None:
        self.layer, self.forward, self.weights = layer, forward, weights
        self._known = known and _is_bilinear(layer) and weights.is_product(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or (args and self._needs_nothing(args[0])):
            return self.forward(*args, **kwargs)
        if not self._known or kwargs or len(args) != 1:  # the call itself, once more in the backward pass
            return recompute_later(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return FrozenProduct.apply(args[0], self)

    def _needs_nothing(self, x: Tensor) -> bool:
        if not x.requires_grad or any(parameter.requires_grad for parameter in self.layer.parameters(recurse=False)):
            return True
        return self.weights.as_stored(self.layer, _type_of_products(x), x.device)

    def gradient(self, of_output: Tensor, shape: torch.Size) -> Tensor:
        """W^T dy (*shape) for dy (…, o), or its like for a convolution, in the type of dy."""
        with self.weights.dense(self.layer, of_output.dtype, of_output.device) as dense:
            layer: Any = self.layer
            for kind, input_gradient in INPUT_GRADIENTS.items():
                if isinstance(layer, kind):
                    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
                    return input_gradient(shape, dense.weight, of_output, *geometry)
            return of_output @ dense.weight


class FrozenProduct(Function):
    """A frozen layer's output for x; its gradient by x is the layer's weight, asked for again, times the output's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenForward) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        # x.data: a host may clamp its input in place, which must not look like a change of what others have saved.
        # The output's: no view, for autograd forbids writing in place into a view that a Function made, and blocks do.
        return layer.forward(x.data).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.layer.gradient(gradient, ctx.shape).to(ctx.dtype), None


def _is_bilinear(layer: nn.Module) -> bool:
    """Whether :meth:`FrozenForward.gradient` knows the layer's arithmetic."""
    if isinstance(layer, tuple(INPUT_GRADIENTS)):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return True


def _type_of_products(x: Tensor) -> torch.dtype:
    """The type that a product with x is computed in: autocast's, where it is on and takes x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
