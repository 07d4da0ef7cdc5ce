"""Several datasets in one: concepts with repeats, and pictures that keep the model from forgetting."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..training.data.concepts import BASE, PICTURES, PRIOR_SHARE, PRIOR_WEIGHT, STYLE, unused_prior
from ..training.data.items import Item, preserving, without_style
from .sockets import DATASET, StyleDataset

logger = logging.getLogger(__name__)

TARGETS = {"pictures": PICTURES, "base model": BASE}  # of prior preservation
SOCKETS = 4


class CombineDatasetsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleDatasetCombine",
            display_name="Combine Style Datasets",
            category="stylewright/data",
            description=(
                "Several Style Datasets as one: concepts with their own style phrases, sizes and repeats, and "
                "regularisation pictures that keep the model from forgetting what else it can draw."
            ),
            search_aliases=["concepts", "merge datasets", "regularisation", "regularization", "prior preservation"],
            inputs=[*_sockets(), *_repeats(), *_preservation()],
            outputs=[
                DATASET.Output("dataset", tooltip="For the trainer, or for another of these nodes."),
                io.String.Output("summary", tooltip="What is in it: pictures, sights in a round, shares of samples."),
            ],
        )

    @classmethod
    def execute(
        cls,
        dataset_1: StyleDataset,
        repeats_1: int,
        repeats_2: int,
        repeats_3: int,
        repeats_4: int,
        prior_weight: float,
        prior_share: float,
        prior_target: str,
        dataset_2: StyleDataset | None = None,
        dataset_3: StyleDataset | None = None,
        dataset_4: StyleDataset | None = None,
        regularisation: StyleDataset | None = None,
    ) -> io.NodeOutput:
        given = [dataset_1, dataset_2, dataset_3, dataset_4]
        repeats = [repeats_1, repeats_2, repeats_3, repeats_4]
        parts = [(each, times) for each, times in zip(given, repeats, strict=True) if each is not None]
        items = [item for n, (part, times) in enumerate(parts, start=1) for item in _repeated(part, times, n)]
        target = TARGETS[prior_target]
        added: list[Item] = []
        if regularisation is not None:
            _refuse_preserving(regularisation)
            added = preserving(_repeated(regularisation, 1, None), target, prior_weight)
        elif target == BASE:
            added = without_style(items, prior_weight)
        note = "" if added else unused_prior(prior_weight, prior_share)
        if note:
            logger.warning("Combine Style Datasets: %s", note)
        datasets = [part for part, _ in parts] + ([regularisation] if regularisation else [])
        combined = StyleDataset(
            items=(*items, *added),
            style_phrase=dataset_1.style_phrase,
            caption_mode=dataset_1.caption_mode,
            resolution=dataset_1.resolution,
            answers=_answers(datasets),
            prior_share=_share([part for part, _ in parts], prior_share if added else None),
            notes=tuple(dict.fromkeys([*(said for part in datasets for said in part.notes), *filter(None, [note])])),
        )
        return io.NodeOutput(combined, summary(combined))


def _sockets() -> list[io.Input]:
    first = "The first concept: sample pictures and the adapter's file take its style phrase and its resolution."
    return [
        DATASET.Input("dataset_1", tooltip=first),
        *(
            DATASET.Input(f"dataset_{n}", optional=True, tooltip="A further concept, with a style phrase of its own.")
            for n in range(2, SOCKETS + 1)
        ),
        DATASET.Input(
            "regularisation",
            optional=True,
            tooltip=(
                "Pictures of what the model is to keep: of the same subjects in no style, for example. Give its Style "
                "Dataset the caption mode plain."
            ),
        ),
    ]


def _repeats() -> list[io.Input]:
    return [
        io.Int.Input(
            f"repeats_{n}",
            default=1,
            min=1,
            max=10_000,
            tooltip=f"How often the pictures of dataset_{n} are seen while those of a dataset with 1 are seen once.",
        )
        for n in range(1, SOCKETS + 1)
    ]


def _preservation() -> list[io.Input]:
    return [
        io.Float.Input(
            "prior_weight",
            default=PRIOR_WEIGHT,
            min=0.001,
            max=1000.0,
            step=0.05,
            tooltip="The loss is the style's plus this times the regularisation pictures', whatever their share.",
        ),
        io.Float.Input(
            "prior_share",
            default=PRIOR_SHARE,
            min=0.01,
            max=0.99,
            step=0.01,
            tooltip="Share of the samples that are regularisation pictures. It moves work, not the objective.",
        ),
        io.Combo.Input(
            "prior_target",
            options=list(TARGETS),
            default="pictures",
            tooltip=(
                "What regularisation holds on to. pictures: they are learned as they are. base model: what the model "
                "without the adapter makes of them; without regularisation pictures, of the style's own under captions "
                "without the style phrase."
            ),
        ),
    ]


def _repeated(dataset: StyleDataset, repeats: int, number: int | None) -> list[Item]:
    """A dataset's items under names that tell datasets apart. ``number`` None = the regularisation's."""
    place = "the regularisation" if number is None else f"dataset {number}"
    return [replace(item, repeats=item.repeats * repeats, name=f"{item.name} of {place}") for item in dataset.items]


def _refuse_preserving(regularisation: StyleDataset) -> None:
    if any(item.concept.role != STYLE for item in regularisation.items):
        raise ValueError("the regularisation has regularisation pictures of its own: link a plain Style Dataset there")


def _answers(datasets: Sequence[StyleDataset]) -> Mapping[str, dict[str, Any]]:
    return {caption: answer for dataset in datasets for caption, answer in dataset.answers.items()}


def _share(parts: Sequence[StyleDataset], own: float | None) -> float:
    """The one share of samples for prior preservation. ValueError where a combined dataset already has another."""
    has = [part.prior_share for part in parts if any(item.concept.role != STYLE for item in part.items)]
    shares = {*has, *([] if own is None else [own])}
    if len(shares) > 1:
        raise ValueError(
            f"datasets with regularisation pictures state several shares of samples, {sorted(shares)}: regularise "
            "once, in the last of these nodes"
        )
    return shares.pop() if shares else PRIOR_SHARE


def summary(dataset: StyleDataset) -> str:
    """One line a concept, and one for what preserves."""
    counts: dict[tuple[str, str], list[Item]] = {}
    for item in dataset.items:
        counts.setdefault((item.concept.role, item.concept.style_phrase or ""), []).append(item)
    lines = []
    for (role, phrase), items in counts.items():
        sights = sum(item.repeats * max(1, len(item.concept.resolutions)) for item in items)
        what = f"in the style {phrase!r}" if role == STYLE else f"to preserve (target: {role})"
        lines.append(f"{len(items)} pictures {what}, {sights} sights in a round")
    if any(role != STYLE for role, _ in counts):
        lines.append(f"{dataset.prior_share:.0%} of the samples preserve")
    return "\n".join([*lines, *dataset.notes])
