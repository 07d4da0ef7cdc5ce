"""The font of labels on pictures. Pillow's own has no letter beyond ASCII, and words are of any language."""

from functools import cache
from pathlib import Path

from PIL import ImageFont


@cache
def font(size: float) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, as matplotlib brings it: Latin, Greek, Cyrillic and more, but no Chinese or Japanese."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
