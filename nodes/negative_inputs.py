"""The widgets of a negative prompt inside attention, and what they state."""

from dataclasses import replace
from typing import TYPE_CHECKING

from comfy_api.latest import io

from .window_inputs import WIDEST, window_widgets

if TYPE_CHECKING:
    from ..training.attention_presets import Preset

AUTOMATIC = "automatic"
FROM_FAMILY = -1.0  # of a number: what is known for the family


def negative_widgets() -> list[io.Input]:
    return [
        io.Combo.Input(
            "method",
            options=[AUTOMATIC, "nasa", "nag", "vsf"],
            default=AUTOMATIC,
            tooltip="nasa: what the prompt says less what the negative says. nag: the same move, held to the size of "
            "the prompt's own answer and blended with it; safest. vsf: both texts in one attention, the negative's "
            "values with their sign flipped. Automatic: nasa where its paper gives a scale (SD1.5, SD2.1, PixArt), "
            "otherwise nag.",
        ),
        io.Float.Input(
            "scale",
            default=FROM_FAMILY,
            min=FROM_FAMILY,
            max=100.0,
            step=0.05,
            tooltip="How strongly. -1 = what is published for this family and method. 0 = not at all. More than the "
            "default removes more, and harms the picture at some point: useful values differ tenfold between models.",
        ),
        io.Float.Input(
            "tau",
            default=FROM_FAMILY,
            min=FROM_FAMILY,
            max=100.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Of nag: the most that the answer to one image token may grow by. -1 = 2.5, as published.",
        ),
        io.Float.Input(
            "blend",
            default=FROM_FAMILY,
            min=FROM_FAMILY,
            max=1.0,
            step=0.025,
            optional=True,
            advanced=True,
            tooltip="Of nag: the share of the moved answer, 0 to 1. -1 = what is published for this family.",
        ),
        io.Boolean.Input(
            "text_only",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Of nasa, where image and text share one attention (FLUX, SD3, …): take away only what came from "
            "the negative text. Off, what the image takes from itself shrinks, too.",
        ),
        *window_widgets(
            "The noise levels at which the negative prompt acts. Few-step models need all of them; with many steps the "
            "first quarter has nearly all of the effect.",
            high=WIDEST,
        ),
        io.String.Input(
            "layers",
            default="",
            placeholder="0-7, 12",
            optional=True,
            advanced=True,
            tooltip="Which attentions to text act, counted from the model's input, from 0. Empty = all.",
        ),
    ]


def chosen(known: "Preset", scale: float, tau: float, blend: float, text_only: bool) -> "Preset":
    """What is known for the family, but for what the user states. ValueError for what is no number of its kind."""
    stated = {"scale": scale, "tau": tau, "blend": blend}
    stated = {name: value for name, value in stated.items() if value != FROM_FAMILY}
    guidance = replace(known.guidance, **stated, text_only=text_only)
    return replace(known, guidance=guidance, source="stated" if "scale" in stated else known.source)


def read_layers(text: str) -> frozenset[int] | None:
    """Numbers and ranges of them, as "0-7, 12"; None for all. ValueError for what is neither."""
    layers: set[int] = set()
    for part in filter(None, (each.strip() for each in text.split(","))):
        first, _, last = (each.strip() for each in part.partition("-"))
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ValueError(f"layers: {part!r} is no number and no range of them: write for example 0-7, 12")
        layers |= set(range(int(first), int(last or first) + 1))
    return frozenset(layers) if layers else None
