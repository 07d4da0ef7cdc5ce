"""LoRAs on the MODELs of a distillation, as adapters: what the teacher wears, and what the student begins with.

ComfyUI writes LoRAs into the weights of a model that is loaded. Taken off the teacher they are in the student's file,
which then is for the model without them.
"""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...training.adapters.attach import layers_to_adapt
from ...training.adapters.methods import AdapterConfig
from ...training.formats.adapters import LoadedAdapter, loaded_from
from ...training.formats.contents import AdapterFile
from ...training.formats.layers import Layer
from ...training.formats.starting import Start, start_of
from ...training.loops.networks import Worn
from .families import OTHER, family_of, model_name
from .identity import digest_of_patch, digest_of_weights
from .patch_terms import place_of_patch
from .starting import refuse_windowed
from .students import STUDENT

Patcher = comfy.model_patcher.ModelPatcher
NAME, WORN = "the linked student's LoRAs", "the teacher's LoRAs"
PLAIN = ("lora", "rslora")  # methods that a LoRA can be turned into
NETWORK = "diffusion_model."


def undressed(teacher: Patcher, config: AdapterConfig) -> tuple[Patcher, Worn | None, str]:
    """A teacher without its LoRAs, these as an adapter that it wears, and what is to be said of it.

    What is no plain LoRA cannot be in the file of a student of ``config``: then all stay under the student.
    """
    if not teacher.patches:
        return teacher, None, ""
    if config.method not in PLAIN:
        return teacher, None, f"a student of the method {config.method} is for the model with the teacher's LoRAs on it"
    try:
        loaded = _loaded(teacher, _patches(teacher))
        _require_layers(teacher, loaded, config, WORN)
    except ValueError as error:
        return teacher, None, f"the student is for the model with the teacher's patches on it: {error}"
    base = teacher.clone()
    base.patches, base.patches_uuid = {}, uuid.uuid4()
    worn = Worn(WORN, loaded)
    return base, worn, f"the student's file has the teacher's LoRAs in it: it {worn.start(config).said}"


def student_start(base: Patcher, student: Patcher | None, config: AdapterConfig) -> Start | None:
    """What the student has more than the base, as a run of ``config`` has it. None without a student.

    ValueError for one of other weights, or whose difference is no LoRA.
    """
    if student is None:
        return None
    _require_same_weights(base, student)
    refuse_windowed(student)
    own = list(_own_patches(base, student))
    if not own:
        raise ValueError(
            "the student is the very model that the teacher is, so that there is nothing to begin with: put a "
            "student's LoRA on it, or unlink it, and the student begins as the teacher"
        )
    loaded = _loaded(student, own)
    _require_layers(base, loaded, config, NAME)
    noted = student.get_attachment(STUDENT) or {}
    return replace(start_of(loaded, config, NAME), one_step=noted.get("one_step", {}))


def _require_layers(model: Patcher, loaded: LoadedAdapter, config: AdapterConfig, name: str) -> None:
    known = layers_to_adapt(model.model.diffusion_model, config, family=family_of(model))
    if foreign := sorted(set(loaded.names) - set(known)):
        raise ValueError(
            f"{name} are on layers that this run does not adapt, such as {foreign[0]}: choose targets that hold all of "
            "them"
        )


def _loaded(model: Patcher, patches: Iterable[tuple[str, tuple]]) -> LoadedAdapter:
    """LoRAs on a model as one adapter. ValueError for patches of another kind."""
    parts: dict[str, list[Layer]] = {}
    for key, patch in patches:
        name, layer = _as_lora(model, key, patch)
        parts.setdefault(name, []).append(layer)
    file = AdapterFile(Path(NAME), {}, None, {name: _summed(each) for name, each in parts.items()}, (), {})
    return loaded_from(file, family=OTHER)  # whose layers keep the names that they have: the network's own


def _patches(model: Patcher) -> Iterator[tuple[str, tuple]]:
    yield from ((key, patch) for key, patches in model.patches.items() for patch in patches)


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
    known = {key: [digest_of_patch(patch) for patch in patches] for key, patches in teacher.patches.items()}
    for key, patch in _patches(student):
        if (digest := digest_of_patch(patch)) in known.get(key, []):
            known[key].remove(digest)
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
            f"there is {kind} on {key}, and a run begins with plain LoRAs alone: link a model that has no other patches"
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
