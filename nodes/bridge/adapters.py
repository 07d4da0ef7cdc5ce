"""Adapters on a MODEL: what a file holds, where it fits, and what of it found no place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.sd
from torch import Tensor

from ...training.formats.contents import read_adapter, read_layers
from ...training.formats.keys import TEXT_ENCODER, detect_family
from ...training.formats.metadata import AdapterMetadata, stated_family
from .families import OTHER, family_of, model_name


class AdapterTensors(dict):
    """LORA_MODEL: tensors by name, as ComfyUI's own nodes take them, with what the file says of itself."""

    def __init__(
        self, tensors: Mapping[str, Tensor], about: AdapterMetadata | None, family: str | None, name: str
    ) -> None:
        super().__init__(tensors)
        self.about = about
        self.family = family  # None = it does not tell
        self.name = name  # for messages

    @property
    def style_phrase(self) -> str:
        return self.about.style_phrase if self.about else ""


@dataclass(frozen=True)
class Applied:
    """A model and a text encoder with an adapter on them."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP | None
    layers: int  # that the adapter changes
    homeless: tuple[str, ...]  # tensors that found no place


def read_tensors(path: Path) -> AdapterTensors:
    """An adapter's file. ValueError names one that is truncated, foreign, or of a newer version."""
    file = read_adapter(path)
    return AdapterTensors(file.tensors, file.about, file.family, path.name)


def with_origin(lora: Mapping[str, Tensor]) -> AdapterTensors:
    """What a link carries: our own trainer's, or the plain dict of ComfyUI's."""
    if isinstance(lora, AdapterTensors):
        return lora
    layers, _ = read_layers(dict(lora))
    return AdapterTensors(lora, None, stated_family({}) or detect_family(layers), "the linked adapter")


def apply_adapter(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP | None,
    lora: AdapterTensors,
    *,
    strength_model: float,
    strength_clip: float,
) -> Applied:
    """Clones with the adapter as patches. ValueError for one of another family, or of which nothing fits."""
    _refuse_foreign(model, lora)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    tensors = ReadingRecord(comfy.lora_convert.convert_lora(dict(lora)))
    patches = comfy.lora.load_lora(tensors, names, log_missing=False)
    model = model.clone()
    placed = set(model.add_patches(patches, strength_model))
    if clip is not None:
        clip = clip.clone()
        placed |= set(clip.add_patches(patches, strength_clip))
    homeless = tuple(key for key in tensors if key not in tensors.read and not (clip is None and _is_text(key)))
    if not placed:
        raise ValueError(
            f"nothing of {lora.name} fits {model_name(model)}: its tensors are {', '.join(list(lora)[:3])}, …"
        )
    return Applied(model, clip, len(placed), homeless)


class ReadingRecord(dict):
    """Remembers which entries were taken out. ComfyUI looks for the names that a model has and reads what it finds."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        super().__init__(entries)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


def _is_text(key: str) -> bool:
    """Whether a tensor belongs to a text encoder."""
    layers, unknown = read_layers({key: _NOTHING})
    return any(name.startswith(TEXT_ENCODER) for name in layers) and not unknown


def _refuse_foreign(model: comfy.model_patcher.ModelPatcher, lora: AdapterTensors) -> None:
    family = family_of(model)
    if family != OTHER and lora.family not in (None, OTHER, family):
        raise ValueError(
            f"{lora.name} is an adapter for the family {lora.family!r}, and this model is a {model_name(model)} "
            f"of the family {family!r}: choose an adapter that was trained on such a model"
        )
