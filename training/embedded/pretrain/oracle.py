"""Stage 2: the oracle, on fresh renders of every attribute value, held-out ones included."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from ...formats.state import write_atomically
from ...randomness import generator
from ..oracle import HEADS, Oracle
from ..renderer import Scene, colours, pose, render
from .stage import Cycle, restarts, run

logger = logging.getLogger(__name__)

CYCLES = ((1000, 1.0), (700, 0.5))  # steps, peak of the learning rate
BATCH = 64
LR = 2e-3


def train_oracle(work: Path, out: Path, *, seed: int, cycles: Sequence[Cycle] = CYCLES) -> None:
    """Trains and saves the oracle to ``out``; ``work`` holds the checkpoint."""
    torch.manual_seed(seed)  # the process is this command's own: layers draw their initial weights globally
    model = Oracle()
    model.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)

    def step(i: int) -> Tensor:
        scene = any_scene(BATCH, seed, "oracle", i)
        pictures = _disturbed(render(scene), generator(seed, "oracle noise", i))
        logits = model(pictures)
        loss = functools.reduce(torch.add, (F.cross_entropy(logits[name], getattr(scene, name)) for name in HEADS))
        loss.backward()
        return loss

    def evaluate(_: int) -> str:
        return ", ".join(f"{name} {share:.3f}" for name, share in accuracy(model, seed).items())

    steps = sum(length for length, _ in cycles)
    checkpoint, schedule = work / "oracle.safetensors", restarts(cycles, warm_up=50)
    run(checkpoint, step, steps, [optimizer], schedule, {"model": model}, evaluate=evaluate)
    state = {key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    write_atomically(out, lambda temporary: save_file(state, temporary))


def any_scene(n: int, seed: int, *place: int | str) -> Scene:
    """n scenes of any subject and style, known or held out."""
    draw = generator(seed, "any scene", *place)
    subject, palette, ground, fill, edge = (torch.randint(count, (n,), generator=draw) for count in HEADS.values())
    return Scene(subject, palette, ground, fill, edge, colours(palette), *pose(n, draw))


@torch.no_grad()
def accuracy(model: Oracle, seed: int, n: int = 1000) -> dict[str, float]:
    """Share of right answers by head on n renders that training does not see."""
    scene = any_scene(n, seed, "oracle test")
    answers = [model(pictures) for pictures in render(scene).split(250)]
    return {
        name: float((torch.cat([a[name] for a in answers]).argmax(1) == getattr(scene, name)).float().mean())
        for name in HEADS
    }


def _disturbed(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Slight blur on half of them, and noise: generated pictures are not as clean as renders."""
    n = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mixed = torch.where(torch.rand(n, 1, 1, 1, generator=draw) < 0.5, blurred, pictures)
    strength = 0.06 * torch.rand(n, 1, 1, 1, generator=draw)
    return mixed + strength * torch.randn(pictures.shape, generator=draw)
