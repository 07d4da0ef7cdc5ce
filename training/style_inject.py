"""StyleInject (arXiv 2401.13942): what it adds to the output of a frozen layer, as functions of tensors.

n down-projections A_i, one up-projection B that they share, and a router that weighs them by the instance:

    s = softmax(R mean_p(x) + r),    D = B sum_i s_i A_i x

and D changes the spread of the frozen output h around its mean m over the positions p, with z = (h - m) / sd:

    f2c (default)   D z - mean_p(D z)    AdaIN with sd + D, centred anew, so that channels keep their means
    f2              D z                  the same, not centred
    f1              mean_p(D) z          one new spread for each channel
    lora            D                    no AdaIN, for comparison

The paper's text was not at hand. What is known of it (the parts, the router for linear layers and convolutions, AdaIN)
leaves the form of the last step open: that choice is ours, and so is the mean instead of the sum over the positions
that a convolution's router sees, with which the routing does not depend on the size of a picture.

Moments are in float32 and over all positions alike: a batch whose shorter prompts were repeated has the same ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("f2c", "f1", "f2", "lora")
EPS = 1e-5  # added to the variance
ROUTER_STD = 0.01  # of R at the start, when all branches count nearly the same


@dataclass(frozen=True)
class Factors:
    """One layer's tensors, of n branches of rank r on i inputs and o outputs."""

    a: Tensor  # (n, r, i[, k, k])
    b: Tensor  # (o, r)
    router: Tensor  # (n, i)
    router_bias: Tensor  # (n,)


def positions(h: Tensor, channel: int) -> tuple[int, ...]:
    """The dimensions of h (b, …) that are neither the batch nor the channels."""
    return tuple(dim for dim in range(1, h.ndim) if dim != channel % h.ndim)


def has_positions(h: Tensor, channel: int) -> bool:
    """Whether there are at least two, so that there is a spread."""
    return any(h.shape[dim] > 1 for dim in positions(h, channel))


def mean_over(x: Tensor, dims: tuple[int, ...], counted: Tensor | None = None) -> Tensor:
    """Mean over ``dims``, which stay as 1, of the positions that are ``counted`` (None = all), in float32 or better."""
    x = x.to(_wide(x))
    if counted is None:
        return x.mean(dims, keepdim=True) if dims else x
    number = counted.sum(dims, keepdim=True).clamp(min=1)
    return (x * counted).sum(dims, keepdim=True) / number


def normalised(h: Tensor, dims: tuple[int, ...], counted: Tensor | None = None) -> Tensor:
    """z = (h - m) / sd, by the moments of each instance and channel, in float32 or better."""
    h = h.to(_wide(h))
    centred = h - mean_over(h, dims, counted)
    return centred * (mean_over(centred.square(), dims, counted) + EPS).rsqrt()


def routed(pooled: Tensor, router: Tensor, bias: Tensor) -> Tensor:
    """s (b, n) of features (b, i), in float32 or better: each row by itself."""
    with torch.autocast(pooled.device.type, enabled=False):
        return F.linear(pooled, router.to(pooled), bias.to(pooled)).softmax(-1)


def style_injected(
    x: Tensor,
    h: Tensor,
    factors: Factors,
    form: str,
    *,
    convolve: Callable[[Tensor, Tensor], Tensor] | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(what is added to ``h``, the routing (b, n)) for the layer's input ``x`` and its own output ``h``.

    Channels are last, x (b, …, i) and h (b, …, o); for a convolution they are second, and ``convolve(x, weight)`` is
    the layer's own convolution with another weight. ``counted`` (b, p, 1) is False for positions that are no content,
    which then count in no mean and get nothing. Without positions (b, i) any form is ``lora``.
    """
    channel = -1 if convolve is None else 1
    dims = positions(x, channel)
    shares = routed(mean_over(x, dims, counted).flatten(1), factors.router, factors.router_bias)
    if not has_positions(h, channel):
        form, counted = "lora", None
    if form == "f1" and convolve is None:
        x = mean_over(x, dims, counted)
    delta = _branches(x, factors, shares, convolve)
    if form == "lora":
        return delta, shares
    dims = positions(h, channel)
    added = _FORMS[form](delta.to(_wide(delta)), normalised(h, dims, counted), dims, counted)
    return added if counted is None else added * counted, shares


def _branches(x: Tensor, factors: Factors, shares: Tensor, convolve: Callable | None) -> Tensor:
    """B sum_i s_i A_i x."""
    x = x.to(torch.promote_types(x.dtype, factors.a.dtype))
    a, b = factors.a.to(x.dtype), factors.b.to(x.dtype)
    if convolve is None:
        mixed = torch.einsum("bn,nri->bri", shares.to(x.dtype), a)  # one matrix for each instance
        inner = torch.einsum("bpi,bri->bpr", x.reshape(len(x), -1, x.shape[-1]), mixed)
        return F.linear(inner.reshape(*x.shape[:-1], -1), b.to(inner.dtype))
    inner = convolve(x, a.flatten(0, 1)).unflatten(1, a.shape[:2])
    inner = torch.einsum("bn,bnr...->br...", shares.to(inner.dtype), inner)
    return F.linear(inner.movedim(1, -1), b.to(inner.dtype)).movedim(-1, 1)


def _f1(delta: Tensor, z: Tensor, dims: tuple[int, ...], counted: Tensor | None) -> Tensor:
    return mean_over(delta, dims) * z


def _f2(delta: Tensor, z: Tensor, dims: tuple[int, ...], counted: Tensor | None) -> Tensor:
    return delta * z


def _f2c(delta: Tensor, z: Tensor, dims: tuple[int, ...], counted: Tensor | None) -> Tensor:
    product = delta * z
    return product - mean_over(product, dims, counted)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_FORMS = {"f1": _f1, "f2": _f2, "f2c": _f2c}
