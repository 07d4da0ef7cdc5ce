"""Pictures and prompts for training, of one reference: the whole with its prompt, and crops with theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

import torch
from torch import Tensor

from ..data.concepts import Concept
from ..data.images import LEAST_SIDE
from ..data.items import Item
from ..randomness import generator
from .boxes import Box, cut, jittered
from .phrases import Phrases, sub_prompts

FULL_SHARE = 0.4  # of the sights that are of the whole picture
ENLARGED = 4  # times a crop grows for training before it is worth a note


@dataclass(frozen=True)
class CropOptions:
    """How crops take part. ValueError for a value out of its range.

    ``full_share``: of the sights that are of the whole picture; None = one of each, whole and crop alike.
    ``variants``: crops of each box, the first as it is, the others moved and resized by up to ``jitter`` of its sides.
    ``outside``: weight of the loss outside of the phrase's own place; 1 = the crop alone tells what is learned.
    """

    full_share: float | None = FULL_SHARE
    variants: int = 4
    jitter: float = 0.1
    outside: float = 1.0

    def __post_init__(self) -> None:
        if self.full_share is not None and not 0.01 <= self.full_share <= 0.99:
            raise ValueError(f"the share of whole pictures is {self.full_share:g}: expected 0.01 to 0.99")
        if not 1 <= self.variants <= 64:
            raise ValueError(f"there are {self.variants} crops of a box: expected 1 to 64")
        if not 0 <= self.jitter <= 0.5:
            raise ValueError(f"crops are moved by {self.jitter:g} of their sides: expected 0 to 0.5")
        if not 0 <= self.outside <= 1:
            raise ValueError(f"the weight outside of a phrase's place is {self.outside:g}: expected 0 to 1")


@dataclass(frozen=True)
class Crop:
    """A part of a picture. ``number``: of the variants of its box, 0 the box itself."""

    phrase: str
    number: int
    box: Box

    def of(self, picture: Tensor) -> Tensor:
        """Its part of (…, h, w)."""
        return cut(picture, self.box)


def crops_of(boxes: Mapping[str, Box], height: int, width: int, options: CropOptions, seed: int) -> list[Crop]:
    """All crops of a picture of this size, phrase after phrase. ValueError for one that is too small to learn from."""
    crops = [
        Crop(phrase, number, box if number == 0 else jittered(box, height, width, draw, options.jitter))
        for phrase, box in boxes.items()
        for draw in [generator(seed, "crops", phrase)]
        for number in range(options.variants)
    ]
    for crop in crops:
        if min(crop.box.width, crop.box.height) < LEAST_SIDE:
            raise ValueError(
                f"a crop of {crop.phrase!r} has {crop.box.width}x{crop.box.height} pixels, too little to learn from: "
                f"expected at least {LEAST_SIDE} a side. Give it more room (padding, least side), or a larger picture"
            )
    return crops


def enlarged(boxes: Mapping[str, Box], resolution: int) -> str:
    """What a person should know of crops with very few pixels for this training size; "" = nothing."""
    few = {phrase: box for phrase, box in boxes.items() if resolution**2 > ENLARGED**2 * box.width * box.height}
    if not few:
        return ""
    listed = ", ".join(f"{phrase} ({box.width}x{box.height})" for phrase, box in few.items())
    return (
        f"crops that are enlarged more than {ENLARGED} times for training at {resolution} show little but blur: "
        f"{listed}. Give them more room (padding, least_side), a larger picture or a lower resolution"
    )


def items_of(
    picture: Tensor,  # (3, h, w) in [0, 1]
    phrases: Phrases,
    crops: Sequence[Crop],
    options: CropOptions,
    masks: Mapping[str, Tensor] | None = None,  # (h, w) in [0, 1], by phrase: its own place. None = not known
    resolutions: tuple[int, ...] = (),  # pixels; () = the run's
) -> list[Item]:
    """The whole picture with its prompt, and every crop with every style phrase, in the shares of ``options``.

    Content phrases and style phrases are seen equally often.
    """
    wholes, each = sights(len(crops) * len(phrases.style), options.full_share)
    found = [_item(picture, phrases.prompt, None, wholes, phrases.style[0], resolutions, "the whole picture")]
    prompts = {(content, style): prompt for content, style, prompt in sub_prompts(phrases)}
    for crop in crops:
        mask = _weights(crop, masks, options.outside)
        for style in phrases.style:
            name = f"crop {crop.number + 1} of {crop.phrase!r}"
            found.append(_item(crop.of(picture), prompts[crop.phrase, style], mask, each, style, resolutions, name))
    return found


def sights(crops: int, full_share: float | None) -> tuple[int, int]:
    """How often the whole picture and each of so many crops is seen in a round: the smallest numbers in the ratio."""
    if full_share is None or not crops:
        return 1, 1
    share = Fraction(full_share).limit_denominator(100)
    whole, crop = share.numerator * crops, share.denominator - share.numerator
    return whole // gcd(whole, crop), crop // gcd(whole, crop)


def _weights(crop: Crop, masks: Mapping[str, Tensor] | None, outside: float) -> Tensor | None:
    """1 on the phrase's own place and ``outside`` elsewhere; None where the loss is the same all over."""
    if outside == 1 or masks is None or crop.phrase not in masks:
        return None
    own = crop.of(masks[crop.phrase]).clamp(0, 1)
    return outside + (1 - outside) * own if own.any() else None


def _item(
    picture: Tensor, prompt: str, mask: Tensor | None, repeats: int, style: str, sizes: tuple[int, ...], name: str
) -> Item:
    concept = Concept(style_phrase=style, caption_mode="full", resolutions=sizes)
    return Item(picture.contiguous(), prompt, mask, repeats, concept, name)


def share_of_wholes(items: Sequence[Item]) -> float:
    """Of all sights, those of the first item."""
    return items[0].repeats / sum(item.repeats for item in items)


def soft_place(values: Tensor, height: int, width: int) -> Tensor:
    """A phrase's own place as weights (height, width): its map, 1 at the largest value."""
    fine = torch.nn.functional.interpolate(values[None, None].float(), (height, width), mode="bilinear")[0, 0]
    return fine / fine.max().clamp(min=torch.finfo(fine.dtype).tiny)
