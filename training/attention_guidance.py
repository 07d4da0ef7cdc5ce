"""Negative prompts inside attention: one query, two texts, and what is made of their two answers.

Z+ is what a query takes from the positive tokens, Z- what it takes from the negative ones, both before the output
projection.

``nasa``  Z+ - scale * Z-  (arXiv 2412.02687). Not neutral: with the same text twice it is (1 - scale) * Z+.
``nag``   Z+ moved away from Z-, its L1 norm held, and blended with Z+ (arXiv 2505.21179). Neutral.
``vsf``   one softmax over both texts' keys, with the negative values' sign flipped (arXiv 2508.10931): W Z+ -
          scale * (1 - W) Z-, where W is the share that falls to the positive keys. With the same text twice it is
          (1 - scale) / 2 * Z+.

Where image and text share one attention (FLUX, SD3 and their kin), Z- holds the image's attention to itself, too, which
``nasa`` would subtract. Its *text-only* form takes from Z- only what came from text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("nasa", "nag", "vsf")


@dataclass(frozen=True)
class Tokens:
    """What is attended to: k and v (..., n, c), and a mask that broadcasts to (..., queries, n), or None."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(torch.cat([self.k, other.k], -2), torch.cat([self.v, other.v], -2), _joined(self, other))

    def times(self, factor: float) -> "Tokens":
        """The same tokens with other values, which ``Z`` is linear in."""
        return Tokens(self.k, self.v * factor, self.mask)


Attend = Callable[[Tensor, Tokens], Tensor]  # a query (..., m, c) and tokens to (..., m, c)


@dataclass(frozen=True)
class AttentionGuidance:
    """How the two answers become one.

    scale: alpha of ``nasa`` and ``vsf``, phi of ``nag``; 0 is the positive answer alone, bit for bit.
    tau: ``nag``: the most that a token's L1 norm may grow by. blend: ``nag``: the share of the moved answer, 0 to 1.
    text_only: ``nasa`` in joint attention: subtract only what came from text.
    """

    method: str = "nasa"
    scale: float = 0.2
    tau: float = 2.5
    blend: float = 0.25
    text_only: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the method is {self.method!r}: expected one of {', '.join(METHODS)}")
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"the scale is {self.scale:g}: expected a number of 0 or more")
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"tau is {self.tau:g}: expected a number above 0")
        if not 0 <= self.blend <= 1:
            raise ValueError(f"blend is {self.blend:g}: expected a number from 0 to 1")

    def cross(self, attend: Attend, q: Tensor, positive: Tokens, negative: Tokens) -> Tensor:
        """Of attention to text alone."""
        return self.joint(attend, q, None, positive, negative)

    def joint(self, attend: Attend, q: Tensor, shared: Tokens | None, positive: Tokens, negative: Tokens) -> Tensor:
        """Of attention to a text and to what both have in common: ``shared`` are the image's tokens."""

        def with_shared(text: Tokens) -> Tokens:
            return text if shared is None else text + shared

        if not self.scale:
            return attend(q, with_shared(positive))
        if self.method == "vsf":
            # The positive tokens last: what else may be behind them (another pack's, a second guidance's) stays there.
            return attend(q, negative.times(-self.scale) + with_shared(positive))
        z_positive = attend(q, with_shared(positive))
        if self.method == "nag":
            return nag(z_positive, attend(q, with_shared(negative)), self.scale, self.tau, self.blend)
        left_alone = shared.times(0.0) if shared is not None and self.text_only else shared
        return nasa(z_positive, attend(q, negative if left_alone is None else negative + left_alone), self.scale)


def nasa(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Z+ - scale * Z-, any shapes that are equal."""
    return torch.add(positive, negative, alpha=-scale)


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, blend: float) -> Tensor:
    """Of (..., tokens, channels): no token's L1 norm grows beyond blend * tau + 1 - blend times that of Z+."""
    moved = positive + scale * (positive - negative)
    norms = [each.abs().sum(-1, keepdim=True, dtype=torch.float32) for each in (positive, moved)]
    allowed = (tau * norms[0] / norms[1].clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
    return positive + blend * (moved * allowed.to(moved.dtype) - positive)


def _joined(first: Tokens, second: Tokens) -> Tensor | None:
    """Masks side by side; True, or 0 where they are added to scores, for tokens that have none."""
    if first.mask is None and second.mask is None:
        return None
    known = first.mask if first.mask is not None else second.mask
    assert known is not None
    masks = []
    for tokens in (first, second):
        size = (*known.shape[:-1], tokens.k.shape[-2])
        if tokens.mask is None:
            masks.append(known.new_full(size, True) if known.dtype == torch.bool else known.new_zeros(size))
        else:
            masks.append(tokens.mask.expand(size))
    return torch.cat(masks, -1)
