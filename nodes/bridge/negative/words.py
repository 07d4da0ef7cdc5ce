"""What a negative prompt on a model does, in words."""

from collections.abc import Collection, Sequence
from typing import Any

import comfy.model_patcher

from ....training.attention_guidance import AttentionGuidance
from ....training.attention_presets import Preset
from ....training.windows import Window
from ..windowed import sentence as where
from .conds import negatives_of


def sentence(
    model: comfy.model_patcher.ModelPatcher,
    negative: Sequence[Sequence[Any]],
    settings: Preset,
    window: Window | None,
    layers: Collection[int] | None,
) -> str:
    """Method, scale and their source, and where it acts."""
    count = len(negatives_of(negative))
    if not count:
        return "the negative prompt is empty: nothing changes"
    if not settings.guidance.scale:
        return "the scale is 0: nothing changes"
    parts = [f"{_formula(settings.guidance)} ({settings.source})"]
    if window is not None:
        parts.append(where(model, window))
    if layers is not None:
        parts.append(f"in layers {', '.join(map(str, sorted(layers)))}")
    if count > 1:
        parts.append(f"{count} negative prompts, averaged")
    return "; ".join(parts)


def _formula(guidance: AttentionGuidance) -> str:
    if guidance.method == "nag":
        return f"nag, scale {guidance.scale:g}, tau {guidance.tau:g}, blend {guidance.blend:g}"
    return f"{guidance.method}, scale {guidance.scale:g}"
