"""LoRA on linear layers (arXiv 2106.09685), y = W x + s B (A x), in fewer passes over memory than peft's own forward.

peft multiplies by s and adds as two operations that each read and write a tensor of the output's size, and again in
the backward pass. Here both ride on the product with B. The products of the backward pass are written with the rank
first, (r, o) (o, n): on a CPU they are up to 4 times faster that way than as (n, o) (o, r). On the small FLUX of
benchmarks/training_step.py all of it takes 6 % off an optimizer step.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

if TYPE_CHECKING:
    from peft.tuners.lora import Linear

ADAPTER = "default"  # the name under which peft keeps the only adapter of a model


class LowRank(Function):
    """result + scale * x A^T B^T, for result (…, o), x (…, i), A (r, i) and B (o, r) of one type."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T
        ctx.save_for_backward(rows, inner, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        # No view of a product: autograd forbids writing in place into a view that a Function made, and blocks do.
        output = torch.empty_like(result, memory_format=torch.contiguous_format)
        flat = output.view(-1, result.shape[-1])
        torch.addmm(result.reshape(flat.shape), inner, b.T, alpha=scale, out=flat)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # ty: ignore[incompatible-method-override]
        rows, inner, a, b = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])
        inner_gradient = torch.mm(b.T, outer.T).mul_(ctx.scale)  # (r, n)
        of_x = (inner_gradient.T @ a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        of_b = torch.mm(inner.T, outer).mul_(ctx.scale).T
        return gradient, of_x, inner_gradient @ rows, of_b, None


@contextmanager
def low_rank_products(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, those of ``layers`` that are peft's plain LoRA on a linear layer compute by :class:`LowRank`.

    The results are peft's but for rounding. Other layers (DoRA, convolutions, quantised ones) stay as they are.
    """
    from peft.tuners.lora import Linear

    with ExitStack() as stack:
        for layer in layers:
            if type(layer) is Linear and not layer.lora_variant:
                layer.forward = partial(_forward, layer)
                stack.callback(vars(layer).pop, "forward")
        yield


def _forward(layer: "Linear", x: Tensor) -> Tensor:
    result = layer.get_base_layer()(x)
    if layer.disable_adapters:
        return result
    (key,) = layer.active_adapters
    a, b = layer.lora_A[key].weight, layer.lora_B[key].weight
    kind = _type_of_products(result, a)
    inputs = layer.lora_dropout[key](x)
    tensors = (tensor.to(kind) for tensor in (result, inputs, a, b))
    return LowRank.apply(*tensors, layer.scaling[key]).to(result.dtype)


def _type_of_products(result: Tensor, a: Tensor) -> torch.dtype:
    """Autocast's type where it is on, else the more precise of model and adapter. What autograd calls is not cast."""
    device = result.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(result.dtype, a.dtype)
