"""From a phrase's map to its box: threshold, largest component, padding, shape, least side. All our choice."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SHAPES = ("square", "own")  # own: the box's, and so the bucket nearest to it


@dataclass(frozen=True)
class Box:
    """Pixels of a picture, from ``left`` and ``top`` up to and without ``right`` and ``bottom``."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def __str__(self) -> str:
        return f"{self.width}x{self.height} at ({self.left}, {self.top})"


@dataclass(frozen=True)
class BoxOptions:
    """How boxes are made of maps. ValueError for a value out of its range."""

    rule: str = "share"  # a key of THRESHOLDS
    share: float = 0.45  # of the largest value
    padding: float = 0.15  # of the box's sides, on each of them
    shape: str = "square"  # or another of SHAPES
    least: float = 0.3  # a side, as a share of the picture's shorter one: texture needs room, too

    def __post_init__(self) -> None:
        if self.rule not in THRESHOLDS:
            raise ValueError(f"unknown threshold {self.rule!r}: expected one of {', '.join(THRESHOLDS)}")
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape of boxes {self.shape!r}: expected one of {', '.join(SHAPES)}")
        for name, low, high in (("share", 0, 1), ("padding", 0, 2), ("least", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} of boxes is {getattr(self, name):g}: expected {low} to {high}")


def box_of_map(values: Tensor, height: int, width: int, options: BoxOptions) -> Box | None:
    """The tight box of a map (h, w) in a picture of this size; None for a map that has nothing above zero."""
    if not values.max() > 0:
        return None
    fine = torch.nn.functional.interpolate(values[None, None].float(), (height, width), mode="bilinear")[0, 0]
    return box_of_mask(largest_component(fine.numpy() >= THRESHOLDS[options.rule](fine.numpy(), options.share)))


def box_of_mask(mask: np.ndarray) -> Box:
    """The tight box of what is True, somewhere, in a mask (h, w)."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest part of a mask (h, w) that hangs together over sides; of equal ones the first."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    return labels == np.bincount(labels.flat)[1:].argmax() + 1


def as_crop(box: Box, height: int, width: int, options: BoxOptions) -> Box:
    """A tight box as it is cut out: padded, in its shape, of a least side, inside the picture of this size."""
    sides = [side * (1 + 2 * options.padding) for side in (box.width, box.height)]
    if options.shape == "square":
        sides = [max(sides)] * 2
    sides = [max(side, options.least * min(height, width)) for side in sides]
    if options.shape == "square":
        sides = [min(sides[0], height, width)] * 2
    return around((box.left + box.right) / 2, (box.top + box.bottom) / 2, sides[0], sides[1], height, width)


def around(x: float, y: float, wide: float, tall: float, height: int, width: int) -> Box:
    """The box of these sides nearest to the centre (x, y) that is inside of a picture."""
    columns, rows = (max(1, min(round(side), most)) for side, most in ((wide, width), (tall, height)))
    left = min(max(round(x - columns / 2), 0), width - columns)
    top = min(max(round(y - rows / 2), 0), height - rows)
    return Box(left, top, left + columns, top + rows)


def cut(picture: Tensor, box: Box) -> Tensor:
    """The part of a picture (…, h, w) that is in the box."""
    return picture[..., box.top : box.bottom, box.left : box.right]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union, in [0, 1]."""
    wide = min(one.right, other.right) - max(one.left, other.left)
    tall = min(one.bottom, other.bottom) - max(one.top, other.top)
    common = max(wide, 0) * max(tall, 0)
    return common / (one.width * one.height + other.width * other.height - common)


def jittered(box: Box, height: int, width: int, draw: torch.Generator, amount: float) -> Box:
    """A box moved by up to ``amount`` of its sides, and of up to so much another size, inside of the picture."""
    right, down, growth = (2 * torch.rand(3, generator=draw) - 1).mul(amount).tolist()
    x, y = (box.left + box.right) / 2 + right * box.width, (box.top + box.bottom) / 2 + down * box.height
    return around(x, y, box.width * (1 + growth), box.height * (1 + growth), height, width)


def otsu(values: np.ndarray, bins: int = 128) -> float:
    """The threshold that leaves the least variance within the two classes (Otsu 1979)."""
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = counts.cumsum(), (counts * centres).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = total / below - (total[-1] - total) / above
    between = np.where((below > 0) & (above > 0), below * above * gap**2, -1)
    return float(edges[1:][between.argmax()])


THRESHOLDS: dict[str, Callable[[np.ndarray, float], float]] = {
    "share": lambda values, share: share * float(values.max()),
    "otsu": lambda values, share: otsu(values),
}
