"""What each phrase took of a picture, drawn: the picture with all boxes, and beside it one panel a phrase."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.fonts import font
from .boxes import Box
from .reference import Found

SIDE = 320  # pixels of the longer side of a panel
CAPTION = 24  # pixels below it
ROW = 4  # panels
COLOURS = ("#e4572e", "#2e86ab", "#3f9b4f", "#b5179e", "#f0a202", "#118ab2", "#7b2cbf", "#8d5b4c")
INK, PAPER = "#22303c", "#ffffff"


def draw_found(picture: Tensor, found: Sequence[Found], columns: int = ROW) -> Tensor:
    """Panels (3, h, w) in [0, 1] of a picture (3, h, w). A thick frame is the crop, a thin one the phrase's own box."""
    scale = SIDE / max(picture.shape[1:])
    panels = [_whole(picture, found, scale), *(_phrase(picture, each, n, scale) for n, each in enumerate(found))]
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    wide, tall = panels[0].size
    sheet = Image.new("RGB", (columns * wide, rows * tall), PAPER)
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % columns * wide, number // columns * tall))
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255).movedim(-1, 0).contiguous()


def _whole(picture: Tensor, found: Sequence[Found], scale: float) -> Image.Image:
    panel, draw = _panel(picture, scale, "what is cut out")
    for number, each in enumerate(found):
        _frame(draw, each.crop, scale, _colour(number), 3)
    return panel


def _phrase(picture: Tensor, found: Found, number: int, scale: float) -> Image.Image:
    shown = picture * (0.25 + 0.75 * found.place)  # dark where the phrase is not
    panel, draw = _panel(shown, scale, found.phrase + (" (your mask)" if found.by_mask else ""))
    _frame(draw, found.tight, scale, PAPER, 1)
    _frame(draw, found.crop, scale, _colour(number), 3)
    return panel


def _panel(picture: Tensor, scale: float, text: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    size = max(1, round(picture.shape[2] * scale)), max(1, round(picture.shape[1] * scale))
    values = (picture.movedim(0, -1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    panel = Image.new("RGB", (size[0] + 4, size[1] + CAPTION), PAPER)
    panel.paste(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC), (2, 0))
    draw = ImageDraw.Draw(panel)
    while draw.textlength(text, font(13)) > size[0] and len(text) > 2:
        text = text[:-2] + "…"
    draw.text((4, size[1] + 3), text, INK, font(13))
    return panel, draw


def _frame(draw: ImageDraw.ImageDraw, box: Box, scale: float, colour: str, width: int) -> None:
    left, top, right, bottom = (round(edge * scale) for edge in (box.left, box.top, box.right, box.bottom))
    draw.rectangle((left + 2, top, max(right, left + 1) + 1, max(bottom, top + 1) - 1), outline=colour, width=width)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
