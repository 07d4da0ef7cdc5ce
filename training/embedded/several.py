"""Pictures of several subjects in one style, with the truth of where each is: references with something to leak."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..randomness import generator
from .renderer import SIZE, SUBJECTS, Scene, Style, colours, extents, render_together

MOST = 4  # subjects of a picture: one in each quarter


@dataclass(frozen=True)
class Several:
    """A picture and what is in it."""

    picture: Tensor  # (3, size, size) float32 in [0, 1]
    subjects: tuple[str, ...]
    boxes: Tensor  # (subjects, 4) int64: left, top, right, bottom in pixels, the last two outside
    style: Style

    @property
    def content(self) -> str:
        """The subjects as a caption has them: ``star and house``."""
        return " and ".join(self.subjects)


def several(subjects: Sequence[int], style: Style, draw: torch.Generator, size: int = SIZE) -> Several:
    """A picture of 2 to 4 different subjects, each in a quarter of its own, turned a little.

    ValueError for any other number of subjects, or the same one twice.
    """
    if not 2 <= len(subjects) <= MOST or len(set(subjects)) < len(subjects):
        raise ValueError(f"several subjects are 2 to {MOST} different ones, got {list(subjects)}")
    palette, ground, fill, edge = (torch.full((len(subjects),), value) for value in vars(style).values())
    place = placed(len(subjects), draw)
    scene = Scene(torch.tensor(subjects), palette, ground, fill, edge, colours(palette), *place)
    names = tuple(SUBJECTS[index] for index in subjects)
    return Several(render_together(scene, size), names, extents(scene, size), style)


def placed(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random centres (n, 2), half-sizes (n,) and angles (n,), each in a quarter of its own."""
    quarters = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]])
    centre = quarters[torch.randperm(MOST, generator=draw)[:n]] + 0.1 * torch.rand(n, 2, generator=draw) - 0.05
    scale = 0.32 + 0.08 * torch.rand(n, generator=draw)
    angle = (2 * torch.rand(n, generator=draw) - 1) * math.radians(14)
    return centre, scale, angle


def draw_several(number: int, style: Style, seed: int, size: int = SIZE) -> Several:
    """The picture with this number of a series: 2, 3 or 4 subjects in turn, drawn at random."""
    draw = generator(seed, "several", number)
    subjects = torch.randperm(len(SUBJECTS), generator=draw)[: 2 + number % 3].tolist()
    return several(subjects, style, draw, size)
