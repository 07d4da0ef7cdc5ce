"""Attention for training on a CPU, where the fused kernel is slow backwards.

On the embedded model (batch 32, 72 tokens, bfloat16 autocast) torch's fused attention takes 20 % of a training
step and the products written out take 5 %; ``sdpa_kernel(SDPBackend.MATH)`` gains nothing there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PlainAttention(TorchFunctionMode):
    """``with PlainAttention():`` computes attention as two batched products and a softmax, in whatever model.

    Memory grows with the square of the token count. With gradient checkpointing the block has to enclose the
    backward pass as well, because that computes again what was not kept.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # torch switches the mode off inside this method, so plain_attention may call what it replaces.
        replacement = plain_attention if func is F.scaled_dot_product_attention else func
        return replacement(*args, **(kwargs or {}))


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,  # None = 1/sqrt(d)
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention over (b, heads, n, d), and that function itself where more is asked for."""
    if query.ndim != 4 or attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
    attention = torch.softmax(torch.bmm(q * scale, k.transpose(1, 2)), -1)
    return torch.bmm(attention, v).unflatten(0, query.shape[:2])
