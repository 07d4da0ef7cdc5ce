"""Widgets of Concept Crops: how boxes are made of maps, how crops take part, how a picture is looked at."""

from comfy_api.latest import io

from ..training.concepts.boxes import SHAPES, THRESHOLDS
from ..training.concepts.reference import LOCATE_BY


def boxes() -> list[io.Input]:
    return [
        io.Combo.Input(
            "threshold",
            options=list(THRESHOLDS),
            default="share",
            optional=True,
            advanced=True,
            tooltip="Where a phrase's map ends. share: at a share of its largest value. otsu: where two levels part.",
        ),
        io.Float.Input(
            "share",
            default=0.45,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="Of the largest value of a map, for the threshold share. Higher: smaller boxes.",
        ),
        io.Float.Input(
            "padding",
            default=0.15,
            min=0.0,
            max=2.0,
            step=0.05,
            optional=True,
            tooltip="What is added around a phrase's own box on each side, as a share of the box.",
        ),
        io.Combo.Input(
            "shape",
            options=list(SHAPES),
            default="square",
            optional=True,
            advanced=True,
            tooltip="square: crops are square. own: crops have the box's shape, and are trained in the nearest size.",
        ),
        io.Float.Input(
            "least_side",
            default=0.3,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="The least side of a crop, as a share of the picture's shorter side: texture needs room, too.",
        ),
    ]


def cutting() -> list[io.Input]:
    return [
        io.Float.Input(
            "whole_share",
            default=0.4,
            min=0.0,
            max=0.99,
            step=0.05,
            optional=True,
            tooltip="Share of the samples that are the whole picture. 0: it is seen as often as each crop.",
        ),
        io.Int.Input(
            "variants",
            default=4,
            min=1,
            max=64,
            optional=True,
            advanced=True,
            tooltip="Crops of each box: the first as it is, the others moved and resized a little.",
        ),
        io.Float.Input(
            "jitter",
            default=0.1,
            min=0.0,
            max=0.5,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="By how much of its sides a crop is moved and resized, at most.",
        ),
        io.Float.Input(
            "outside_weight",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Weight of the loss in a crop outside of the phrase's own place. 1: the crop alone tells.",
        ),
    ]


def looking() -> list[io.Input]:
    return [
        io.Int.Input(
            "noises",
            default=4,
            min=1,
            max=64,
            optional=True,
            advanced=True,
            tooltip=(
                "With how much chance a picture is looked at: so many noises at each of three noise levels, of four by "
                "prediction error."
            ),
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            optional=True,
            control_after_generate=io.ControlAfterGenerate.fixed,  # other crops are another training
            tooltip="Draws noises and moves crops. The same seed finds and cuts the same.",
        ),
        io.Combo.Input(
            "locate_by",
            options=list(LOCATE_BY),
            default="attention",
            optional=True,
            tooltip=(
                "attention: what the model looks at for each phrase, FineStyle's way. prediction error: where it does "
                "worse when the prompt lacks the phrase; one more run a phrase, on any model, and better boxes from a "
                "model that draws several things well."
            ),
        ),
    ]
