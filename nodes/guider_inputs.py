"""The widgets of the guider: which rule, its scales, and where each acts."""

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..training.guidance import RULES
from .window_inputs import WIDEST, window_widgets

if TYPE_CHECKING:
    from ..training.guidance import Guidance

# (id, default, what it says) by rule, in the order of the rule's arguments.
SCALES: dict[str, tuple[tuple[str, float, str], ...]] = {
    "FineStyle": (
        ("lambda_1", 1.0, "Style: what the adapter changes, once more. 0 is CFG. 0 to 2; 0.5 for FLUX.1."),
        (
            "lambda_2",
            3.5,
            "Semantics: the prompt against the negative, in the adapted model. One less than a cfg: 6.5 for SD1.5, 5.5 "
            "for SDXL, 3.5 for SD3.5, 2 for the embedded model, 0 for FLUX.1, which saves a pass.",
        ),
    ),
    "CFG": (("cfg", 4.5, "As in a CFGGuider of the adapted model; base is not asked."),),
    "StyleDrop": (
        ("lambda_a", 2.0, "Style: what the adapter changes, once more."),
        ("lambda_b", 5.0, "The prompt against the negative, in the base. One less than a cfg."),
    ),
    "DCO consistency": (
        ("w_text", 7.5, "The cfg of the base: the prompt against the negative."),
        ("w_consistency", 3.0, "How much of what the adapter changes is added to the base. 1 = as trained, 0 = none."),
    ),
}


def guidance_widgets() -> list[io.Input]:
    return [
        io.DynamicCombo.Input(
            "rule",
            options=[
                io.DynamicCombo.Option(rule, [_scale(*scale) for scale in scales]) for rule, scales in SCALES.items()
            ],
            tooltip="How predictions with and without the adapter, with and without the prompt, become one. FineStyle: "
            "of adapters that were trained on one picture, three passes a step. DCO consistency: StyleDrop's rule in "
            "other numbers, for adapters that were trained with the loss dco. A scale that is 0 saves its pass.",
        ),
        *window_widgets(
            "The noise levels at which the style is strengthened; beyond them its scale is 0, which saves the base's "
            "pass. Where style is made: log_snr below -6.52 at 1024x1024.",
            high=-6.5,
            prefix="style_",
        ),
        *window_widgets(
            "The noise levels at which the prompt is strengthened; beyond them its scale is 0, a cfg of 1.",
            high=WIDEST,
            prefix="text_",
        ),
    ]


def _scale(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=-20.0, max=100.0, step=0.1, round=0.001, tooltip=tooltip)


def guidance_of(rule: dict[str, Any] | None) -> "tuple[str, Guidance]":
    """The name of the rule that the widgets state, and what it is. ValueError for none that is known, and for scales
    that are no numbers."""
    name = rule["rule"] if rule else None
    if rule is None or name not in SCALES:
        raise ValueError(f"the rule is not one of {', '.join(SCALES)}: choose one of them")
    return name, RULES[name](*(rule[scale] for scale, _, _ in SCALES[name]))
