"""What pre-training sees: scenes of known attributes, and scenes whose palette has no name."""

from dataclasses import replace

import torch
from torch import Tensor

from ...randomness import generator
from ..renderer import (
    EDGES,
    FILLS,
    SEEN_GROUNDS,
    SEEN_PALETTES,
    SUBJECTS,
    Scene,
    colours,
    is_held_out,
    pose,
    random_colours,
)
from ..vocabulary import named_styles

RANDOM_PALETTE = 0.35  # share of scenes with a random palette: it is what makes new styles learnable


def training_scenes(
    n: int, seed: int, *place: int | str, random_palette: float = RANDOM_PALETTE, named: float = 0.0
) -> Scene:
    """n scenes without any held-out value or combination; shares of nameless palettes and of named styles."""
    draw = generator(seed, "scenes", *place)
    style = _seen_styles(n, draw)
    nameless = torch.rand(n, generator=draw) < random_palette
    palette = torch.where(nameless, -1, style[0])
    tones = torch.where(nameless.view(-1, 1, 1), random_colours(n, draw), colours(style[0]))
    subject = torch.randint(len(SUBJECTS), (n,), generator=draw)
    scene = Scene(subject, palette, *style[1:], tones, *pose(n, draw))
    return _with_named_styles(scene, named, draw) if named else scene


def _with_named_styles(scene: Scene, share: float, draw: torch.Generator) -> Scene:
    """Gives this share of all scenes, taken from those whose palette has a name, one of the named styles."""
    styles = torch.tensor([list(vars(style).values()) for style in named_styles().values()])
    chosen = styles[torch.randint(len(styles), (len(scene),), generator=draw)].unbind(1)
    known = scene.palette >= 0
    take = known & (torch.rand(len(scene), generator=draw) < share / known.float().mean())
    palette, ground, fill, edge = (
        torch.where(take, new, old)
        for new, old in zip(chosen, (scene.palette, scene.ground, scene.fill, scene.edge), strict=True)
    )
    tones = torch.where(take.view(-1, 1, 1), colours(palette), scene.colours)
    return replace(scene, palette=palette, ground=ground, fill=fill, edge=edge, colours=tones)


def _seen_styles(n: int, draw: torch.Generator) -> Tensor:
    """Attribute indices (4, n), uniform over what may be seen."""
    ranges = (SEEN_PALETTES, SEEN_GROUNDS, len(FILLS), len(EDGES))
    kept = torch.empty(4, 0, dtype=torch.int64)
    while kept.shape[1] < n:  # once, but for a handful of scenes
        style = torch.stack([torch.randint(count, (2 * n,), generator=draw) for count in ranges])
        kept = torch.cat([kept, style[:, ~is_held_out(*style)]], 1)
    return kept[:, :n]
