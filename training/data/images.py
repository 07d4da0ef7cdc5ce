"""Pictures from files and from memory, as float32 tensors (3, h, w) in [0, 1], sRGB, upright, opaque.

The order matters: orientation from EXIF, colours to sRGB, transparency over white, and only then resampling, which
would otherwise mix the invisible colours of transparent pixels into the visible ones.
"""

import io
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
LEAST_SIDE = 8  # pixels: less shows nothing, and is most likely a placeholder
MARGIN = 8  # times the length that is used of a picture: more is cut off before it is resized
OVERSHOOT = 0.05  # how far pixels from memory may leave [0, 1], as resampled pictures do, before it is a mistake


@dataclass(frozen=True)
class Picture:
    """What an item shows, at its own size. In the mask 1 is learned from and 0 is not; None = all of it."""

    pixels: Tensor  # (3, h, w)
    mask: Tensor | None  # (1, h, w)


def load_picture(image: Tensor | Path, mask: Tensor | Path | None, name: str) -> Picture:
    """An item's picture and mask. A mask that is the picture's own file means the picture's transparency.

    ValueError, with ``name``, for what is missing, unreadable, empty, tiny, not finite or of the wrong shape.
    """
    pixels = open_image(image) if isinstance(image, Path) else check_pixels(image, name)
    if min(pixels.shape[1:]) < LEAST_SIDE:
        raise ValueError(
            f"{name} is {_size(pixels)} pixels, too little to learn from: expected at least {LEAST_SIDE} a side"
        )
    if mask is None:
        return Picture(pixels, None)
    if isinstance(mask, Path):
        values = open_alpha(mask) if mask == image else open_mask(mask)
    else:
        values = check_mask(mask, name)
    values = _of_size(values, pixels, name)
    if not values.any():
        raise ValueError(f"The mask of {name} is black all over: white marks what is learned")
    return Picture(pixels, None if bool((values == 1).all()) else values)


def _of_size(mask: Tensor, pixels: Tensor, name: str) -> Tensor:
    """A mask (1, h, w) at the size of its picture. ValueError where their shapes differ: it has lost its place."""
    (rows, columns), (height, width) = mask.shape[1:], pixels.shape[1:]
    if (rows, columns) == (height, width):
        return mask
    # A side may be rounded by half a pixel at either size.
    if abs(rows * width - columns * height) > 0.5 * (rows + columns + height + width):
        raise ValueError(
            f"The mask of {name} is {_size(mask)}, the picture {_size(pixels)}: they have to be equal, or of one shape"
        )
    size = (height, width)
    return F.interpolate(mask[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"


def open_image(path: Path) -> Tensor:
    """A picture file as (3, h, w). Of several frames the first; transparency over white."""
    colours, alpha = _read(path)
    if alpha is not None:
        colours = colours * alpha + (1 - alpha)
    return torch.from_numpy(np.ascontiguousarray(colours.transpose(2, 0, 1)))


def open_alpha(path: Path) -> Tensor:
    """How opaque a picture is, (1, h, w): ones where its file has no transparency."""
    colours, alpha = _read(path)
    opacity = np.ones_like(colours[..., 0]) if alpha is None else alpha[..., 0]
    return torch.from_numpy(np.ascontiguousarray(opacity[None]))


def open_mask(path: Path) -> Tensor:
    """A mask file as (1, h, w): its brightness, 1 = white."""
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)  # luma of ITU-R BT.601
    return (open_image(path) * weights).sum(0, keepdim=True).clamp(0, 1)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (h, w, 3) and opacity (h, w, 1) or None, float32 in [0, 1]."""
    if not path.is_file():
        raise ValueError(f"There is no picture {path}")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in _DEEP_MODES or upright.mode.startswith("I;16"):
                return _deep(upright), None
            return _colours(upright, path), _opacity(upright)
    except Exception as error:  # Pillow's decoders raise almost anything for broken files
        raise ValueError(f"Cannot read the picture {path}: {error}") from error


# Pillow's convert() clips these to 255 instead of scaling them.
_DEEP_MODES = {"I": 65535, "F": 1}


def _deep(image: Image.Image) -> np.ndarray:
    """A grey picture of 16 bits, or of floats in [0, 1]."""
    limit = _DEEP_MODES.get(image.mode, 65535)
    grey = np.asarray(image, dtype=np.float32) / limit
    if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1):
        raise ValueError(f"its values leave the range 0 to {limit}: save it with 8 or 16 bits")
    return np.repeat(grey[..., None], 3, axis=2)


def _colours(image: Image.Image, path: Path) -> np.ndarray:
    """sRGB, with the profile of the file honoured."""
    plain = image.convert("RGBA").convert("RGB") if image.has_transparency_data else image
    plain = plain if plain.mode in ("RGB", "L", "CMYK") else plain.convert("RGB")
    profile = image.info.get("icc_profile")
    rgb = _to_srgb(plain, profile, path) if profile else plain.convert("RGB")
    return np.asarray(rgb, dtype=np.float32) / 255


def _to_srgb(image: Image.Image, profile: bytes, path: Path) -> Image.Image:
    """Colours through an ICC profile; without it, and with a warning, where the profile is of no use."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), intent, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError) as error:
        log.warning("The colour profile of %s is ignored: %s", path, error)
        return image.convert("RGB")
    assert converted is not None  # only None with inPlace
    return converted


def _opacity(image: Image.Image) -> np.ndarray | None:
    if not image.has_transparency_data:
        return None
    return np.asarray(image.convert("RGBA").getchannel("A"), dtype=np.float32)[..., None] / 255


def check_pixels(pixels: Tensor, name: str) -> Tensor:
    """A picture from memory, checked: (3, h, w) floats in [0, 1] on the CPU, clamped there."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        hint = ": channels come first" if pixels.ndim == 3 and pixels.shape[-1] in (1, 3, 4) else ""
        raise ValueError(f"{name} has the shape {tuple(pixels.shape)}, expected (3, height, width){hint}")
    values = _check_values(pixels, name)
    low, high = float(values.min()), float(values.max())
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}, expected 0 to 1")
    return values.clamp(0, 1)


def check_mask(mask: Tensor, name: str) -> Tensor:
    """A mask from memory, (h, w) or (1, h, w), as (1, h, w) in [0, 1]."""
    if not (mask.ndim == 2 or (mask.ndim == 3 and mask.shape[0] == 1)):
        raise ValueError(f"The mask of {name} has the shape {tuple(mask.shape)}, expected (height, width)")
    values = _check_values(mask, f"The mask of {name}").reshape(1, *mask.shape[-2:])
    if values.min() < -OVERSHOOT or values.max() > 1 + OVERSHOOT:
        raise ValueError(f"The mask of {name} leaves the range 0 to 1")
    return values.clamp(0, 1)


def _check_values(values: Tensor, name: str) -> Tensor:
    """float32 on the CPU. ValueError for no pixels, integers, NaN."""
    if values.numel() == 0:
        raise ValueError(f"{name} has no pixels: its shape is {tuple(values.shape)}")
    if not values.is_floating_point():
        raise ValueError(f"{name} holds {values.dtype}, expected floats from 0 to 1: divide bytes by 255")
    values = values.detach().to("cpu", torch.float32)
    if not values.isfinite().all():
        raise ValueError(f"{name} contains NaN or infinity")
    return values


def fit(values: Tensor, height: int, width: int) -> Tensor:
    """(c, h, w) resized until it covers (height, width), then cut to it around the centre.

    Bicubic, with the kernel widened when shrinking (antialiasing); in [0, 1], which cubic kernels overshoot.
    """
    values = _without_far_ends(values, height / width)
    rows, columns = values.shape[-2:]
    size = cover(rows, columns, height, width)
    if size != (rows, columns):
        values = F.interpolate(values[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = corner(rows, columns, height, width)
    return values[:, top : top + height, left : left + width].contiguous()


def cover(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """The size that a picture (rows, columns) is resized to, to cover (height, width)."""
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def corner(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Top and left, in the resized picture, of the (height, width) that are cut around its centre."""
    tall, wide = cover(rows, columns, height, width)
    return (tall - height) // 2, (wide - width) // 2


def _without_far_ends(values: Tensor, shape: float) -> Tensor:
    """Of a picture that is many times as long as what is cut from it, the middle: the rest would fill the memory.

    ``shape`` is height/width of the cut. What stays is ``MARGIN`` times as long, beyond the reach of any kernel.
    """
    rows, columns = values.shape[-2:]
    tall, wide = min(rows, math.ceil(MARGIN * shape * columns)), min(columns, math.ceil(MARGIN / shape * rows))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    return values[:, top : top + tall, left : left + wide]
