"""The outlines of the subjects: polygons, and their signed distances as tables."""

import functools
import math

import torch
from torch import Tensor

REACH = 2.6  # half-width of the square on which the distances are tabulated


@functools.cache
def distance_fields(names: tuple[str, ...], resolution: int = 320) -> Tensor:
    """Signed distance to each outline, negative inside, (len(names), resolution, resolution). Made once.

    Pixel centres lie at (i + 0.5) / resolution of the way from -REACH to REACH, y downwards.
    """
    step = 2 * REACH / resolution
    axis = (torch.arange(resolution) + 0.5) * step - REACH
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x, y], -1).view(-1, 2)
    polygons = outlines()
    return torch.stack([polygon_distance(points, polygons[name]).view(resolution, resolution) for name in names])


def polygon_distance(points: Tensor, vertices: Tensor) -> Tensor:
    """Signed distance (n,) of points (n, 2) to a simple polygon (m, 2); negative inside (even-odd rule)."""
    nearest = torch.full((len(points),), math.inf)
    inside = torch.zeros(len(points), dtype=torch.bool)
    for a, b in zip(vertices, vertices.roll(-1, 0), strict=True):
        edge, offset = b - a, points - a
        t = ((offset @ edge) / (edge @ edge)).clamp(0, 1)
        nearest = torch.minimum(nearest, (offset - t[:, None] * edge).norm(dim=1))
        crosses = (a[1] > points[:, 1]) != (b[1] > points[:, 1])
        inside ^= crosses & (offset[:, 0] < offset[:, 1] * edge[0] / torch.where(edge[1] == 0, 1.0, edge[1]))
    return torch.where(inside, -nearest, nearest)


def outlines() -> dict[str, Tensor]:
    """The subjects as polygons (m, 2) of about unit radius, y downwards."""
    return {name: torch.tensor(corners) for name, corners in CORNERS.items()} | {
        "circle": _circle(),
        "star": _star(),
        "heart": _heart(),
        "crescent": _crescent(),
    }


CORNERS = {
    "square": [[-0.78, -0.78], [0.78, -0.78], [0.78, 0.78], [-0.78, 0.78]],
    "triangle": [[0.0, -0.95], [0.98, 0.75], [-0.98, 0.75]],
    "cross": [
        *([-0.3, -0.95], [0.3, -0.95], [0.3, -0.3], [0.95, -0.3], [0.95, 0.3], [0.3, 0.3]),
        *([0.3, 0.95], [-0.3, 0.95], [-0.3, 0.3], [-0.95, 0.3], [-0.95, -0.3], [-0.3, -0.3]),
    ],
    "arrow": [[-1.0, -0.3], [0.05, -0.3], [0.05, -0.8], [1.05, 0.0], [0.05, 0.8], [0.05, 0.3], [-1.0, 0.3]],
    "tree": [
        *([0.0, -1.05], [0.62, -0.2], [0.3, -0.2], [0.85, 0.6], [0.2, 0.6], [0.2, 1.0], [-0.2, 1.0]),
        *([-0.2, 0.6], [-0.85, 0.6], [-0.3, -0.2], [-0.62, -0.2]),
    ],
    "house": [[0.0, -1.0], [0.95, -0.2], [0.7, -0.2], [0.7, 0.85], [-0.7, 0.85], [-0.7, -0.2], [-0.95, -0.2]],
}


def _turn() -> Tensor:
    return torch.linspace(0, 2 * math.pi, 97)[:-1]


def _circle() -> Tensor:
    return 0.88 * torch.stack([torch.cos(_turn()), torch.sin(_turn())], 1)


def _star() -> Tensor:
    corner = torch.arange(10) * math.pi / 5 - math.pi / 2
    spike = torch.where(torch.arange(10) % 2 == 0, 1.05, 0.45)
    return torch.stack([spike * torch.cos(corner), spike * torch.sin(corner)], 1)


def _heart() -> Tensor:
    """The well-known curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled."""
    turn = _turn()
    sin, cos = torch.sin(turn), torch.cos(turn)
    height = 13 * cos - 5 * torch.cos(2 * turn) - 2 * torch.cos(3 * turn) - torch.cos(4 * turn)
    return torch.stack([0.92 * sin**3, -0.06 * height - 0.08], 1)


def _crescent() -> Tensor:
    """A disc less a smaller one to its right; the two arcs meet at the horns."""
    outer, inner = torch.linspace(0.9, 2 * math.pi - 0.9, 64), torch.linspace(2 * math.pi - 1.38, 1.38, 64)
    far = torch.stack([torch.cos(outer), torch.sin(outer)], 1) * 0.98
    near = torch.stack([0.45 + 0.78 * torch.cos(inner), 0.78 * torch.sin(inner)], 1)
    return torch.cat([far, near])
