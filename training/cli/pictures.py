"""What the command line is given to learn from, as items: concepts, and what preserves."""

import logging
from dataclasses import replace

from ..data.concepts import BASE, Concept, unused_prior
from ..data.items import Item, preserving, read_folder, without_style
from ..loops.config import TrainConfig
from .job import Job, Pictures

log = logging.getLogger(__name__)


def items_of(job: Job, options: TrainConfig) -> list[Item]:
    """The items of a job. ValueError for folders that cannot be trained on, with everything that is wrong."""
    items = [item for pictures in job.all_concepts for item in _read(job, pictures, options.style_phrase)]
    if job.regularisation is not None:
        kept = read_folder(job.regularisation, concept=Concept(style_phrase="", caption_mode="plain"))
        return [*items, *preserving(kept, job.prior_target, job.prior_weight)]
    if job.prior_target == BASE:
        return [*items, *without_style(items, job.prior_weight)]
    if note := unused_prior(job.prior_weight, job.prior_share):
        log.warning("%s", note)
    return items


def _read(job: Job, pictures: Pictures, style_phrase: str) -> list[Item]:
    concept = Concept(
        style_phrase=style_phrase if pictures.style_phrase is None else pictures.style_phrase,
        caption_mode=pictures.caption_mode or job.caption_mode,
        resolutions=pictures.resolutions,
        orders=pictures.caption_orders or job.caption_orders,
        keep=job.keep_tags if pictures.keep_tags is None else pictures.keep_tags,
    )
    return read_folder(pictures.images, repeats=pictures.repeats, concept=concept, alpha_masks=job.alpha_masks)


def at_sizes(items: list[Item], resolution: int, more: tuple[int, ...]) -> list[Item]:
    """The items at the run's sizes in pixels, where their concept says nothing."""
    sizes = tuple(dict.fromkeys([resolution, *more]))
    return [
        item if item.concept.resolutions else replace(item, concept=replace(item.concept, resolutions=sizes))
        for item in items
    ]


def phrase_of(job: Job, options: TrainConfig) -> str:
    """The style phrase that the adapter's file and sample pictures take: the run's, or the first concept's."""
    phrases = (pictures.style_phrase for pictures in job.all_concepts)
    return options.style_phrase or next((phrase for phrase in phrases if phrase), "")
