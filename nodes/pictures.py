"""IMAGE, MASK and captions of links as items: batches and lists of batches, of any sizes."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..training.data.captions import listed
from ..training.data.concepts import Concept
from ..training.data.items import Item, items_from_memory

logger = logging.getLogger(__name__)

NO_MASK = (64, 64)  # what Load Image gives, black, for a picture that has none


def linked_items(
    images: Sequence[Tensor] | None,
    masks: Sequence[Tensor] | None,
    captions: Sequence[str] | str,
    *,
    inverted: bool = False,
    repeats: int = 1,
    concept: Concept,
) -> list[Item]:
    """Items of batches (b, h, w, c) with masks (b, h, w). ValueError where their numbers differ."""
    pictures = [_opaque(picture) for batch in images or [] for picture in _pictures(batch)]
    if not pictures:
        raise ValueError("there are no pictures: link some to 'images', or choose a folder")
    white = None if masks is None else [mask for batch in masks for mask in _masks(batch, inverted)]
    missing = [f"picture {n}" for n, mask in enumerate(white or [], start=1) if mask is None]
    if missing:
        logger.info("no mask is painted on %s: learned from whole", listed(missing))
    return items_from_memory(pictures, captions, white, repeats=repeats, concept=concept)


def one_picture(batch: Tensor) -> Tensor:
    """The only picture (3, h, w) of a batch (1, h, w, c). ValueError for several."""
    if len(pictures := _pictures(batch)) != 1:
        raise ValueError(f"there are {len(pictures)} pictures: link one, such as by Image From Batch")
    return _opaque(pictures[0])


def _pictures(batch: Tensor) -> Tensor:
    if batch.ndim != 4 or batch.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(f"images of shape {tuple(batch.shape)} are no pictures: expected (batch, height, width, 3)")
    return batch


def _opaque(picture: Tensor) -> Tensor:
    """(h, w, c) as (3, h, w): grey in all three colours, and what is transparent over white, as of files."""
    channels = picture.movedim(-1, 0)
    colours = channels[:1].expand(3, -1, -1) if len(channels) < 3 else channels[:3]
    if len(channels) in (2, 4):
        alpha = channels[-1:]
        return colours * alpha + (1 - alpha)
    return colours


def _masks(batch: Tensor, inverted: bool) -> list[Tensor | None]:
    """The masks of a batch, white where it is learned; None for Load Image's "there is no mask"."""
    if batch.ndim == 4 and 1 in (batch.shape[1], batch.shape[-1]):
        batch = batch.squeeze(1 if batch.shape[1] == 1 else -1)
    batch = batch[None] if batch.ndim == 2 else batch
    if batch.ndim != 3:
        raise ValueError(f"masks of shape {tuple(batch.shape)} are no masks: expected (batch, height, width)")
    return [None if _none(mask) else (1 - mask if inverted else mask) for mask in batch]


def _none(mask: Tensor) -> bool:
    return tuple(mask.shape) == NO_MASK and not bool(torch.count_nonzero(mask))


def lines(captions: Sequence[str]) -> list[str] | str:
    """One caption a picture: a list as it came, or the lines of one text. A single line is the caption of all."""
    if len(captions) > 1:
        return list(captions)
    texts = [line for line in captions[0].splitlines() if line.strip()]
    if not texts:
        raise ValueError("there are no captions: write what each picture shows, one line a picture")
    return one_for_all(texts)


def one_for_all(captions: Sequence[str]) -> list[str] | str:
    """A single caption as that of every picture."""
    return captions[0] if len(captions) == 1 else list(captions)


def sizes(resolution: int, more: str) -> tuple[int, ...]:
    """Training sizes in pixels: ``resolution``, and those of a text such as "512, 768". ValueError for what is none."""
    words = more.replace(",", " ").split()
    bad = [word for word in words if not (word.isdecimal() and 64 <= int(word) <= 4096)]
    if bad:
        raise ValueError(f"more_resolutions holds {', '.join(bad)}: expected numbers of pixels from 64 to 4096")
    return tuple(dict.fromkeys([resolution, *map(int, words)]))
