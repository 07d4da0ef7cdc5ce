"""One-step students on a MODEL, which knows by its file how it is called."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import comfy.model_patcher

from ...training.data.captions import listed
from ...training.formats.contents import read_about
from ...training.formats.metadata import AdapterMetadata
from ...training.one_step_presets import OneStepPreset, student_preset
from .families import family_of

# Attachment of a MODEL: the student's family, side and ``one_step``, and the names of all students' files on it.
STUDENT = "stylewright.student"


def mark(model: comfy.model_patcher.ModelPatcher, name: str, about: AdapterMetadata | None) -> None:
    """Notes on a clone of ours that a student was put on it. Nothing happens for an adapter that is none."""
    noted = about and _about(name, about, students_on(model))
    if noted:
        model.set_attachments(STUDENT, noted)


def students_on(model: comfy.model_patcher.ModelPatcher) -> tuple[str, ...]:
    """The names of the students' files on a model, the first one first, as far as their files say that they are."""
    noted = _noted(model)
    return () if noted is None else tuple(noted.get("names", ()))


def several_students(model: comfy.model_patcher.ModelPatcher) -> list[str]:
    """What is to be said of a model with more than one student on it."""
    names = students_on(model)
    if len(names) < 2:
        return []
    return [
        f"{len(names)} one-step students are on this model ({', '.join(names)}), each of which is the whole way from "
        "noise to a picture: together they draw noise. Take all but one off"
    ]


def refuse_as_teacher(model: comfy.model_patcher.ModelPatcher) -> None:
    """ValueError for a model that draws in one step already."""
    if _noted(model) is not None:
        name = listed(list(students_on(model))) or "an adapter"
        raise ValueError(
            f"the teacher has a one-step student on it ({name}), which draws in no more steps than one: link the model "
            "without it as the teacher, and the model with it as the student, to begin with it"
        )


def preset_of(model: comfy.model_patcher.ModelPatcher) -> OneStepPreset:
    """How the student on this model is called. ValueError where there is none, or one of another family."""
    noted = _noted(model)
    if noted is None:
        raise ValueError(
            "no file on this model says that it is a one-step student: put one on by Load Style LoRA, load one with "
            "all of its weights by Load Diffusion Model (of a ComfyUI that remembers the file), or switch one_step on "
            "in Embedded Model; or choose a preset"
        )
    return student_preset(family_of(model), noted["side"], noted["one_step"])


def _noted(model: comfy.model_patcher.ModelPatcher) -> Mapping[str, Any] | None:
    return model.get_attachment(STUDENT) or _of_whole(model)


def _of_whole(model: comfy.model_patcher.ModelPatcher) -> Mapping[str, Any] | None:
    """The same of a student with all weights that ComfyUI's own loader read.

    It drops what the file says. Newer versions keep how to load the model again, and thereby the file's path.
    """
    _, given, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    path = given[0] if given else None
    if not isinstance(path, str | PathLike) or not Path(path).is_file():
        return None
    try:
        about = read_about(Path(path))
    except ValueError:  # another kind of file
        return None
    return None if about is None else _about(Path(path).name, about)


def _about(name: str, about: AdapterMetadata, others: tuple[str, ...] = ()) -> dict[str, Any] | None:
    if not about.one_step:
        return None
    side, names = about.resolution or 1024, (*others, name)
    return {"family": about.family, "side": side, "one_step": about.one_step, "names": names}
