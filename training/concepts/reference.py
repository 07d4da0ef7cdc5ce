"""A reference picture taken apart: where its phrases are, by a model or by the user, and what is trained of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import load_picture
from ..data.items import Item
from .boxes import Box, BoxOptions, as_crop, box_of_map, box_of_mask
from .crops import CropOptions, crops_of, items_of, soft_place
from .phrases import Phrases

LOCATE_BY = ("attention", "prediction error")  # of a frozen model: :mod:`.locate` and :mod:`.errors`

# Maps (phrases, h', w') in [0, 1] of the whole picture, of the content phrases and maybe of others behind them.
Locate = Callable[[Phrases], Tensor]


@dataclass(frozen=True)
class Found:
    """Where a content phrase is in a picture (h, w)."""

    phrase: str
    tight: Box
    crop: Box  # what is cut out
    place: Tensor  # (h, w) in [0, 1]: the mask that the user gave, or the model's map
    by_mask: bool

    def __str__(self) -> str:
        return f"{self.phrase}: {self.crop}" + (" (your mask)" if self.by_mask else "")


def find(
    picture: Tensor,  # (3, h, w) in [0, 1]
    phrases: Phrases,
    masks: Mapping[str, Tensor],  # (h, w) by content phrase, white where it is
    locate: Locate | None,  # None = masks alone
    options: BoxOptions,
) -> list[Found]:
    """Every content phrase. ValueError for one that is nowhere, and for masks that do not fit."""
    height, width = picture.shape[1:]
    if strangers := [phrase for phrase in masks if phrase not in phrases.content]:
        raise ValueError(f"masks of what is no content phrase: {', '.join(map(repr, strangers))}")
    unmasked = [phrase for phrase in phrases.content if phrase not in masks]
    if unmasked and locate is None:
        raise ValueError(
            f"nothing tells where {', '.join(map(repr, unmasked))} is in the picture: give a model with its text "
            "encoder and VAE, or a mask of each"
        )
    maps = {}
    if unmasked and locate is not None:
        maps = dict(zip(phrases.content, locate(phrases), strict=False))
    found = []
    for phrase in phrases.content:
        if phrase in masks:
            place = _mask(picture, masks[phrase], phrase)
            tight: Box | None = box_of_mask((place > 0.5).numpy())
        else:
            place, tight = soft_place(maps[phrase], height, width), box_of_map(maps[phrase], height, width, options)
        if tight is None:
            raise ValueError(f"the model sees {phrase!r} nowhere in the picture: give a mask of it, or leave it out")
        found.append(Found(phrase, tight, as_crop(tight, height, width, options), place, phrase in masks))
    return found


def competing(phrases: Phrases, by: str) -> tuple[str, ...]:
    """The phrases whose maps compete. By attention the style's words take their share, too; errors of a style, which
    is everywhere, would say nothing of places."""
    return phrases.content if by == "prediction error" else (*phrases.content, *phrases.style)


def _mask(picture: Tensor, mask: Tensor, phrase: str) -> Tensor:
    """A mask (h, w) at the picture's size. ValueError, with the phrase, for one of another shape or without white."""
    checked = load_picture(picture, mask, repr(phrase)).mask
    place = torch.ones(picture.shape[1:]) if checked is None else checked[0]
    if not (place > 0.5).any():
        raise ValueError(f"the mask of {phrase!r} has no white in it: white marks where it is")
    return place


def items_found(
    picture: Tensor,
    phrases: Phrases,
    found: Sequence[Found],
    options: CropOptions,
    *,
    seed: int,
    resolutions: tuple[int, ...] = (),
) -> list[Item]:
    """What is trained of the picture: the whole, and crops with their prompts."""
    height, width = picture.shape[1:]
    crops = crops_of({each.phrase: each.crop for each in found}, height, width, options, seed)
    return items_of(picture, phrases, crops, options, {each.phrase: each.place for each in found}, resolutions)


def size_to_look_at(height: int, width: int, resolution: int, multiple: int) -> tuple[int, int]:
    """About resolution² pixels in the picture's own shape, in multiples of a token."""
    scale = resolution / (height * width) ** 0.5
    rows, columns = (max(1, round(side * scale / multiple)) * multiple for side in (height, width))
    return rows, columns


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """The whole of a picture (3, h, w) at another size."""
    return F.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
