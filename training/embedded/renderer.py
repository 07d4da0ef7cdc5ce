"""The world of the embedded model: simple subjects drawn in composable styles.

A picture is a :class:`Scene`: one subject and four independent style attributes (palette, ground, fill,
edge). Shapes are signed distance fields, so every edge is anti-aliased analytically, and because we own the
renderer the right picture for any prompt can be drawn: style and subject scores are exact.

Canvas coordinates run over [-1, 1] with y downwards; images are float32 (b, 3, size, size) in [0, 1].
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from .outlines import REACH, distance_fields

SIZE = 128  # pixels; 64 image tokens of the small FLUX
SOFT = 14 * 2 / SIZE  # width of a soft edge in canvas units
INK = 0.035  # half the width of an inked edge

SUBJECTS = ("circle", "square", "triangle", "star", "heart", "cross", "crescent", "arrow", "tree", "house")
GROUNDS = ("flat", "stripes", "diagonal", "checker", "sunset", "dots", "waves")
FILLS = ("solid", "hatched", "shaded", "outline")
EDGES = ("crisp", "soft", "inked")
PALETTES = {  # ground 1, ground 2, figure 1, figure 2
    "ocean": ("#1b4b7a", "#2f76b5", "#ffe9b0", "#ff9f5a"),
    "forest": ("#1f4d2e", "#37784a", "#f2e8c9", "#d9a441"),
    "candy": ("#ffc2dd", "#ff94c2", "#7a1fa2", "#3f51b5"),
    "desert": ("#e8c48a", "#d19a56", "#7b2d26", "#c4512d"),
    "neon": ("#12061f", "#3a1466", "#39ff14", "#ff2bd6"),
    "autumn": ("#f6d5a0", "#eba65a", "#8c2f1b", "#4f5d2f"),
    "mono": ("#ececec", "#b8b8b8", "#1a1a1a", "#5c5c5c"),
    "rose": ("#5c1230", "#8f2750", "#ffd9e3", "#ff8fab"),
    "lemon": ("#fff59d", "#ffe04a", "#2e7d32", "#00796b"),
    "grape": ("#3b1c5a", "#5f3690", "#c9f2c7", "#f7d94c"),
    "mint": ("#c8f2e0", "#8cdcc0", "#12355b", "#c2185b"),
    "brick": ("#8e3b2e", "#b85c46", "#f4f0e6", "#26415e"),
    "ice": ("#e3f4ff", "#b0daf5", "#c62828", "#0d47a1"),  # from here on held out of pre-training
    "lava": ("#2b0a05", "#6b1508", "#ffb300", "#ff3d00"),
    "moss": ("#a9b665", "#7d8f3a", "#2b1d0e", "#e8e3d0"),
    "dusk": ("#2a2f5b", "#54508f", "#ff9fb2", "#ffe082"),
}
SEEN_PALETTES = 12  # the first palettes are seen in pre-training, the others never
SEEN_GROUNDS = 6  # likewise: "waves" is never seen

ATTRIBUTES = {"palette": tuple(PALETTES), "ground": GROUNDS, "fill": FILLS, "edge": EDGES}


@dataclass(frozen=True)
class Style:
    """Four attribute indices: what a style is in this world."""

    palette: int
    ground: int
    fill: int
    edge: int

    @classmethod
    def named(cls, palette: str, ground: str, fill: str, edge: str) -> "Style":
        return cls(tuple(PALETTES).index(palette), GROUNDS.index(ground), FILLS.index(fill), EDGES.index(edge))

    @property
    def words(self) -> tuple[str, str, str, str]:
        return tuple(PALETTES)[self.palette], GROUNDS[self.ground], FILLS[self.fill], EDGES[self.edge]


# Styles that pre-training never shows. The first four are new combinations of known attributes, the next
# three have a new palette, the last a new palette and a new ground.
HELD_OUT_STYLES = {
    "regatta": Style.named("ocean", "checker", "shaded", "soft"),
    "herbarium": Style.named("forest", "dots", "outline", "inked"),
    "carnival": Style.named("candy", "diagonal", "hatched", "crisp"),
    "lantern": Style.named("grape", "sunset", "solid", "inked"),
    "glacier": Style.named("ice", "stripes", "solid", "soft"),
    "furnace": Style.named("lava", "dots", "shaded", "crisp"),
    "meadow": Style.named("moss", "checker", "hatched", "inked"),
    "twilight": Style.named("dusk", "waves", "solid", "crisp"),
}


def is_held_out(palette: Tensor, ground: Tensor, fill: Tensor, edge: Tensor) -> Tensor:
    """True where a combination of seen attributes is kept out of pre-training (about 6 % of them), (b,) bool."""
    held = (palette + 2 * ground + 3 * fill + 5 * edge) % 17 == 0
    for style in HELD_OUT_STYLES.values():
        held |= (palette == style.palette) & (ground == style.ground) & (fill == style.fill) & (edge == style.edge)
    return held


def held_out_combinations() -> list[Style]:
    """All combinations of seen attribute values that pre-training never shows."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (SEEN_PALETTES, SEEN_GROUNDS, len(FILLS), len(EDGES))))
    return [Style(*row) for row in grid[is_held_out(*grid.unbind(1))].tolist()]


@dataclass(frozen=True)
class Scene:
    """A batch of pictures to draw. Indices are (b,) int64, ``colours`` is (b, 4, 3) in [0, 1]."""

    subject: Tensor
    palette: Tensor  # index into PALETTES, or -1 for a palette without a name
    ground: Tensor
    fill: Tensor
    edge: Tensor
    colours: Tensor
    centre: Tensor  # (b, 2) in canvas units
    scale: Tensor  # (b,) half-size of the subject in canvas units
    angle: Tensor  # (b,) radians

    def __len__(self) -> int:
        return len(self.subject)

    def __getitem__(self, rows: slice | Tensor) -> "Scene":
        return Scene(*(getattr(self, field.name)[rows] for field in fields(self)))


def colours(palette: Tensor) -> Tensor:
    """The four colours of named palettes, (b, 4, 3) in [0, 1]."""
    table = torch.tensor(
        [[[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in four] for four in PALETTES.values()]
    )
    return table[palette]


def random_colours(n: int, generator: torch.Generator) -> Tensor:
    """Palettes without a name: two related ground colours and two figure colours that stand out, (n, 4, 3)."""
    pool = 32  # drawn per palette; only the first four are looked at, but what training saw depends on all draws
    ground = torch.rand(n, pool, 3, generator=generator)
    second = (ground + 0.22 * torch.randn(n, pool, 3, generator=generator)).clamp(0, 1)
    figures = torch.rand(n, pool, 2, 3, generator=generator)
    candidates = torch.cat([ground[:, :, None], second[:, :, None], figures], 2)
    contrast = torch.cdist(candidates[:, :, :2], candidates[:, :, 2:]).amin((-2, -1))
    contrast = contrast + 0.5 * (ground - second).norm(dim=-1).clamp(max=0.35)
    # The most legible of four: the best of many would always be black against white.
    best = contrast[:, :4].argmax(-1, keepdim=True)
    return candidates[torch.arange(n)[:, None], best].squeeze(1)


def pose(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random centre (n, 2), half-size (n,) and angle (n,) of the subjects."""
    centre = 0.30 * torch.rand(n, 2, generator=generator) - 0.15
    scale = 0.56 + 0.18 * torch.rand(n, generator=generator)
    angle = (2 * torch.rand(n, generator=generator) - 1) * math.radians(14)
    return centre, scale, angle


def scene_of(subject: Tensor, style: Style, generator: torch.Generator) -> Scene:
    """Scenes of the given subjects (b,), all in one style, with random poses."""
    n = len(subject)
    palette, ground, fill, edge = (
        torch.full((n,), value) for value in (style.palette, style.ground, style.fill, style.edge)
    )
    return Scene(subject, palette, ground, fill, edge, colours(palette), *pose(n, generator))


def render(scene: Scene, size: int = SIZE) -> Tensor:
    """Draws the scenes: (b, 3, size, size) float32 in [0, 1]."""
    return _with_subjects(_empty(scene, size), scene, size)


def render_together(scene: Scene, size: int = SIZE) -> Tensor:
    """Draws all subjects of the scenes, from the first to the last, into one picture on the ground of the first one:
    (3, size, size).
    """
    picture = _empty(scene[:1], size)
    for i in range(len(scene)):
        picture = _with_subjects(picture, scene[i : i + 1], size)
    return picture[0]


def extents(scene: Scene, size: int = SIZE) -> Tensor:
    """The smallest boxes around the subjects, with their ink, (b, 4) int64: left, top, right, bottom in pixels.

    Right and bottom are the first pixels outside. A pixel counts from half coverage on.
    """
    x, y, _ = _canvas(size)
    distance, _ = _subject_distance(scene, x, y)
    inked = (scene.edge == EDGES.index("inked")).view(-1, 1, 1)
    inside = distance <= INK * inked
    rows, columns = inside.any(2), inside.any(1)
    return torch.stack([_first(columns), _first(rows), size - _first(columns.flip(1)), size - _first(rows.flip(1))], 1)


def _first(marks: Tensor) -> Tensor:
    """Index of the first True of each row, (b,)."""
    return marks.int().argmax(1)


def _canvas(size: int) -> tuple[Tensor, Tensor, float]:
    """Places of the pixels' centres in canvas units, x and y (size, size), and the side of one."""
    pixel = 2 / size
    axis = (torch.arange(size) + 0.5) * pixel - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y, pixel


def _empty(scene: Scene, size: int) -> Tensor:
    """The grounds alone, (b, 3, size, size)."""
    x, y, pixel = _canvas(size)
    return _mix(scene.colours[:, 0], scene.colours[:, 1], _grounds(x, y, pixel)[scene.ground])


def _with_subjects(pictures: Tensor, scene: Scene, size: int) -> Tensor:
    """Each picture with the subject of its scene in front."""
    x, y, pixel = _canvas(size)
    distance, along = _subject_distance(scene, x, y)
    figure, inside = _figure(scene, distance, along, x, y, pixel)
    edge = scene.edge.view(-1, 1, 1)
    width = torch.where(edge == EDGES.index("soft"), SOFT, pixel)
    image = _mix3(pictures, figure, _coverage(inside, width))
    ink = _coverage(distance.abs() - INK, pixel) * (edge == EDGES.index("inked"))
    return _mix3(image, torch.full_like(image, 0.06), ink)


def _coverage(distance: Tensor, width: Tensor | float) -> Tensor:
    """Share of a pixel inside an edge at this signed distance (negative inside)."""
    return (0.5 - distance / width).clamp(0, 1)


def _square_wave(u: Tensor, period: float, pixel: float) -> Tensor:
    """An anti-aliased wave of 0 and 1 over u."""
    to_edge = (((u / period) % 1 - 0.5).abs() - 0.25) * period
    return _coverage(to_edge, pixel)


def _grounds(x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Share of the second ground colour, one pattern for each of GROUNDS, (7, h, w)."""
    columns, rows = _square_wave(x, 1.0, pixel), _square_wave(y, 1.0, pixel)
    near_dot = torch.hypot((x + 1) % 0.5 - 0.25, (y + 1) % 0.5 - 0.25)
    patterns = {
        "flat": torch.zeros_like(x),
        "stripes": _square_wave(y, 0.5, pixel),
        "diagonal": _square_wave((x + y) / math.sqrt(2), 0.5, pixel),
        "checker": columns * rows + (1 - columns) * (1 - rows),
        "sunset": (y + 1) / 2,
        "dots": _coverage(near_dot - 0.13, pixel),
        "waves": _square_wave(y + 0.1 * torch.sin(2 * math.pi * x), 0.5, pixel),
    }
    return torch.stack([patterns[name] for name in GROUNDS])


def _figure(scene: Scene, distance: Tensor, along: Tensor, x: Tensor, y: Tensor, pixel: float) -> tuple[Tensor, Tensor]:
    """The figure's colours (b, 3, h, w) and the signed distance (b, h, w) of the area that they fill."""
    fill = scene.fill.view(-1, 1, 1)
    hatching = _square_wave((x - y) / math.sqrt(2), 0.17, pixel)
    share = hatching * (fill == FILLS.index("hatched")) + along * (fill == FILLS.index("shaded"))
    stroke = 0.085  # half the line width of outlines
    inside = torch.where(fill == FILLS.index("outline"), (distance + stroke).abs() - stroke, distance)
    return _mix(scene.colours[:, 2], scene.colours[:, 3], share), inside


def _mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Blend of two colours (b, 3) by a field (b, h, w)."""
    return torch.lerp(first[:, :, None, None], second[:, :, None, None], share[:, None])


def _mix3(below: Tensor, above: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(below, above, share[:, None])


def _subject_distance(scene: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance in canvas units, and the height within the subject from 0 (top) to 1, both (b, h, w)."""
    cos, sin = torch.cos(scene.angle).view(-1, 1, 1), torch.sin(scene.angle).view(-1, 1, 1)
    scale = scene.scale.view(-1, 1, 1)
    dx = (x - scene.centre[:, 0].view(-1, 1, 1)) / scale
    dy = (y - scene.centre[:, 1].view(-1, 1, 1)) / scale
    local = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], -1)
    field = distance_fields(SUBJECTS)[scene.subject][:, None]
    distance = F.grid_sample(field, local / REACH, padding_mode="border", align_corners=False)
    return distance[:, 0] * scale, ((local[..., 1] + 1) / 2).clamp(0, 1)
