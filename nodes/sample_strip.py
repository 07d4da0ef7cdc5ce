"""How a style was learned, in one picture a prompt: before training, on the way, and after it."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..training.data.fonts import font

MOST = 8  # pictures in a strip: the first, the last, and others evenly between
LARGEST = 512  # longest side of one, in pixels
GAP = 8  # pixels
LINE = 30  # height of a line of words
PAPER, INK, PALE = "white", "#22303c", "#6b7887"


def draw_strips(
    samples: Mapping[int, Sequence[Path]], prompts: Sequence[str], steps: int, first: str = "before"
) -> Tensor:
    """One labelled strip a prompt, (b, h, w, 3) in [0, 1].

    ``samples``: by step, one picture a prompt; ``steps``: of the whole run, after which it says "after". ``first``:
    what the pictures of step 0 are called.
    """
    chosen = evenly(sorted(samples), MOST)
    labels = [label_of(step, steps, first) for step in chosen]
    strips = [
        draw_strip([samples[step][index] for step in chosen], labels, prompt) for index, prompt in enumerate(prompts)
    ]
    return torch.cat([_as_tensor(strip) for strip in strips])


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the steps, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def label_of(step: int, steps: int, first: str = "before") -> str:
    return first if step == 0 else f"after {step} steps" if step == steps else f"step {step}"


def draw_strip(paths: Sequence[Path], labels: Sequence[str], prompt: str) -> Image.Image:
    """The pictures side by side at one size, each under its label, and the prompt below."""
    tiles = [_tile(path) for path in paths]
    width, height = tiles[-1].size
    whole = len(tiles) * (width + GAP) + GAP
    strip = Image.new("RGB", (whole, height + 2 * LINE), PAPER)
    draw = ImageDraw.Draw(strip)
    for index, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        left = GAP + index * (width + GAP)
        draw.text((left, LINE / 2), _fitting(draw, label, width, 16), INK, font(16), anchor="lm")
        strip.paste(tile.resize((width, height), Image.Resampling.LANCZOS), (left, LINE))
    words = _fitting(draw, prompt, whole - 2 * GAP, 14)
    draw.text((GAP, height + 1.5 * LINE), words, PALE, font(14), anchor="lm")
    return strip


def _tile(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        tile = picture.convert("RGB")
    scale = min(1.0, LARGEST / max(tile.size))
    return tile.resize((round(tile.width * scale), round(tile.height * scale)), Image.Resampling.LANCZOS)


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: float, size: int) -> str:
    """The text, or as much of its beginning as is not wider than ``width`` pixels."""
    if draw.textlength(text, font(size)) <= width:
        return text
    most = bisect_right(range(len(text)), width, key=lambda length: draw.textlength(f"{text[:length]}…", font(size)))
    return f"{text[: max(0, most - 1)].rstrip()}…"


def _as_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).float() / 255
