"""One-step students on a MODEL, which knows by its file how it is called."""

from collections.abc import Mapping
from typing import Any

import comfy.model_patcher

from ...training.formats.metadata import AdapterMetadata
from ...training.one_step_presets import OneStepPreset, student_preset
from .families import family_of

STUDENT = "stylewright.student"  # attachment of a MODEL: the student's family, side and ``one_step``


def mark(model: comfy.model_patcher.ModelPatcher, about: AdapterMetadata | None) -> None:
    """Notes on a clone of ours that a student was put on it. Nothing happens for an adapter that is none."""
    if about is not None and about.one_step:
        side = about.resolution or 1024
        model.set_attachments(STUDENT, {"family": about.family, "side": side, "one_step": about.one_step})


def preset_of(model: comfy.model_patcher.ModelPatcher) -> OneStepPreset:
    """How the student on this model is called. ValueError where there is none, or one of another family."""
    noted: Mapping[str, Any] | None = model.get_attachment(STUDENT)
    if noted is None:
        raise ValueError(
            "no file on this model says that it is a one-step student: put one on by Load Style LoRA or switch "
            "one_step on in Embedded Model, or choose a preset"
        )
    return student_preset(family_of(model), noted["side"], noted["one_step"])
