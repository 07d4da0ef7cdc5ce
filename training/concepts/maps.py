"""Maps of phrases: how much each place of a picture attends to a phrase's tokens, in a model's own attention.

In a UNet that is cross-attention. Where picture and text share one attention it is the part of it from the picture to
the text, with weights that add up to 1 over the text. FineStyle takes its maps from the frozen model; which layers,
noise levels and norms it takes is not in any source that we know, so these are our choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

MIDDLE = (2, 4)  # sides of a UNet's tokens in latent pixels, of the layers that count: 16x16 and 32x32 in SD1.5
SKIPPED = 0.15  # share of the layers of joint attention that come first, and do not count
PATCHES = (2, 1)  # sides of a token where picture and text share one attention, the more usual first

# Of a sequence's length and of how many tokens text and picture have: where each begins in it. None = it is another.
Joint = Callable[[int, int, int], tuple[int, int] | None]


def text_first(length: int, text: int, picture: int) -> tuple[int, int] | None:
    return (0, text) if length == text + picture else None


def picture_first(length: int, text: int, picture: int) -> tuple[int, int] | None:
    return (picture, 0) if length == text + picture else None


@dataclass(frozen=True)
class Layout:
    """What is known of the sequences that a model attends over."""

    text: int  # tokens
    height: int  # of the latents
    width: int
    joint: Joint = text_first  # where picture and text share one attention
    sides: tuple[int, ...] = PATCHES  # of a token in latent pixels there

    def grid(self, side: int) -> tuple[int, int]:
        """Rows and columns of a picture's tokens of so many latent pixels a side."""
        return ceil(self.height / side), ceil(self.width / side)

    def side_of(self, tokens: int, sides: Sequence[int]) -> int | None:
        return next((side for side in sides if self.grid(side)[0] * self.grid(side)[1] == tokens), None)


@dataclass
class Recorder:
    """Sums up what the layers of a model attend to. One call of the model after another, of one picture each."""

    layout: Layout
    phrases: Sequence[Sequence[int]]  # places of each phrase's tokens in the text
    sums: dict[int, Tensor] = field(default_factory=dict)  # by layer: (phrases, rows, columns)
    sides: dict[int, int] = field(default_factory=dict)  # of a token in latent pixels, by layer
    joint: bool = False
    calls: int = 0
    layer: int = 0  # the next one

    def begin(self) -> None:
        """Before each call of the model."""
        self.calls, self.layer = self.calls + 1, 0

    def see(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> None:
        """One attention of queries (b, heads, n, d) to keys (b, heads, m, d), of whatever it is.

        mask: (…, n or 1, m), True where a key is seen, or added to the scores.
        """
        parts = self._parts(q.shape[2], k.shape[2])
        if parts is None:
            return
        picture, text, side = parts
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # of grouped queries
        seen = None if mask is None else mask[..., picture if mask.shape[-2] > 1 else slice(None), text]
        found = attention_to(q[:, :, picture], k[:, :, text], self.phrases, seen)
        found = found.unflatten(1, self.layout.grid(side)).cpu()
        self.sums[self.layer] = self.sums[self.layer] + found if self.layer in self.sums else found
        self.sides[self.layer] = side
        self.layer += 1

    def _parts(self, queries: int, keys: int) -> tuple[slice, slice, int] | None:
        """Which queries are the picture's and which keys the text's; None where it is no attention to the text."""
        layout = self.layout
        if keys == layout.text and queries != keys:
            side = layout.side_of(queries, (1, 2, 4, 8, 16, 32))
            return None if side is None else (slice(None), slice(None), side)
        for side in layout.sides:
            rows, columns = layout.grid(side)
            begun = layout.joint(keys, layout.text, rows * columns)
            if begun is not None and keys - queries <= begun[1]:
                self.joint = True
                text, picture = begun[0], begun[1] - (keys - queries)  # queries may be of the sequence's end alone
                return slice(picture, picture + rows * columns), slice(text, text + layout.text), side
        return None

    def maps(self) -> Tensor:
        """The mean map of each phrase, (phrases, height, width) of the latents. ValueError where nothing was seen."""
        if not self.sums:
            raise ValueError(
                "no attention of the picture to the text was seen in this model: locate by prediction error instead, "
                "or give boxes by masks"
            )
        size = (self.layout.height, self.layout.width)
        layers = [self.sums[layer] / self.calls for layer in self._counting()]
        return torch.stack([F.interpolate(each[None], size, mode="bilinear")[0] for each in layers]).mean(0)

    def _counting(self) -> list[int]:
        """The layers that count."""
        if self.joint:
            return list(self.sums)[int(SKIPPED * len(self.sums)) :]
        middle = [layer for layer, side in self.sides.items() if side in MIDDLE]
        return middle or list(self.sums)


def attention_to(q: Tensor, k: Tensor, phrases: Sequence[Sequence[int]], mask: Tensor | None = None) -> Tensor:
    """Attention of a picture's queries (b, heads, n, d) to a text's keys (b, heads, m, d), by phrase: (phrases, n).

    Weights are of a softmax over the text alone, their mean is over heads and rows, and of a phrase's tokens the
    largest counts at each place. float32, head by head: a whole FLUX would fill the memory.
    """
    total = torch.zeros(())
    for head in range(q.shape[1]):
        scores = q[:, head].float() @ k[:, head].float().transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            own = mask if mask.ndim < 4 else mask[:, head if mask.shape[1] > 1 else 0]
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
        total = total.to(scores) + scores.softmax(-1).mean(0)
    return torch.stack([total[:, list(places)].amax(-1) for places in phrases]) / q.shape[1]


def contrasted(maps: Tensor) -> Tensor:
    """Maps (phrases, h, w), each from 0 to 1, less the mean of the others: what a phrase has for itself.

    A single map stays as it is. Where a map is flat, it is zero.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    if len(maps) == 1:
        return scaled
    others = (scaled.sum(0, keepdim=True) - scaled) / (len(maps) - 1)
    return (scaled - others).clamp(min=0)
