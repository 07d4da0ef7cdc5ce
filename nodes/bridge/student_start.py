"""A MODEL with a student on it as what a distillation begins with: its own LoRAs, as one adapter on the teacher."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...training.adapters.methods import AdapterConfig
from ...training.formats.adapters import loaded_from
from ...training.formats.contents import AdapterFile
from ...training.formats.keys import FAMILIES
from ...training.formats.layers import Layer
from ...training.formats.starting import Start, start_of
from .families import family_of, model_name
from .identity import digest_of_patch, digest_of_weights
from .patch_terms import place_of_patch
from .starting import refuse_windowed

Patcher = comfy.model_patcher.ModelPatcher
NAME = "the linked student"
NETWORK = "diffusion_model."


def student_start(teacher: Patcher, student: Patcher | None, config: AdapterConfig) -> Start | None:
    """What the student has more than the teacher, as a run of ``config`` has it. None without a student.

    ValueError for one of other weights, or whose difference is no LoRA.
    """
    if student is None:
        return None
    _require_same_weights(teacher, student)
    refuse_windowed(student)
    parts: dict[str, list[Layer]] = {}
    for key, patch in _own_patches(teacher, student):
        name, layer = _as_lora(student, key, patch)
        parts.setdefault(name, []).append(layer)
    if not parts:
        raise ValueError(
            "the student is the very model that the teacher is, so that there is nothing to begin with: put a "
            "student's LoRA on it, or unlink it, and the student begins as the teacher"
        )
    layers = {name: _summed(each) for name, each in parts.items()}
    file = AdapterFile(Path(NAME), {}, None, layers, (), {})
    family = family_of(teacher)
    return start_of(loaded_from(file, "native" if family in FAMILIES else None, family=family), config, NAME)


def _require_same_weights(teacher: Patcher, student: Patcher) -> None:
    if family_of(student) != family_of(teacher):
        raise ValueError(
            f"the student is a {model_name(student)} and the teacher a {model_name(teacher)}: both are LoRAs on one "
            "network here, so link the model that the teacher is, with a student's LoRA on it"
        )
    if not teacher.is_clone(student) and digest_of_weights(teacher) != digest_of_weights(student):
        raise ValueError(
            f"the student has other weights than the teacher ({model_name(teacher)}), and not only a LoRA more: link "
            "the model that the teacher is, with a student's LoRA on it"
        )


def _own_patches(teacher: Patcher, student: Patcher) -> Iterator[tuple[str, tuple]]:
    """Patches that the teacher has not."""
    for key, patches in student.patches.items():
        known = [digest_of_patch(patch) for patch in teacher.patches.get(key, [])]
        for patch in patches:
            if (digest := digest_of_patch(patch)) in known:
                known.remove(digest)
            else:
                yield key, patch


def _as_lora(student: Patcher, key: str, entry: tuple) -> tuple[str, Layer]:
    """A patch as a layer's name in the network, and its LoRA. ValueError for another kind."""
    strength, patch, of_weight, offset, function = entry
    place = place_of_patch((key, offset, function) if function else (key, offset) if offset else key)
    plain = isinstance(patch, LoRAAdapter) and place.parameter == "weight" and of_weight == 1.0 and function is None
    if not plain or not key.startswith(NETWORK) or any(part is not None for part in patch.weights[3:]):
        kind = type(patch).__name__ if not isinstance(patch, tuple) else f"a patch of the kind {patch[0]!r}"
        raise ValueError(
            f"the student has {kind} on {key}, and a run begins with plain LoRAs alone: link a student whose LoRA it "
            "is, without other patches after the teacher's"
        )
    up, down, alpha = (part.float().cpu() if isinstance(part, Tensor) else part for part in patch.weights[:3])
    scale = strength * (1.0 if alpha is None else float(alpha) / down.shape[0])
    up = up * scale
    if place.rows is not None:
        start, length = place.rows
        whole = up.new_zeros(_outputs(student, key), *up.shape[1:])
        whole[start : start + length] = up
        up = whole
    return place.layer.removeprefix(NETWORK), Layer("lora", {"A": down, "B": up})


def _outputs(model: Patcher, key: str) -> int:
    return comfy.utils.get_attr(model.model, key).shape[0]


def _summed(layers: list[Layer]) -> Layer:
    """Of the sum of their effects."""
    tensors: Any = {
        "A": torch.cat([layer.tensors["A"] for layer in layers]),
        "B": torch.cat([layer.tensors["B"] for layer in layers], 1),
    }
    return layers[0] if len(layers) == 1 else Layer("lora", tensors)
