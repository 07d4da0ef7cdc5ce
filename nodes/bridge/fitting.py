"""Where ComfyUI puts the tensors of an adapter's file, and what of them finds no place or one of another size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.sd
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ...training.formats.keys import TEXT_ENCODER
from ...training.formats.spelling import read_key


def spellings(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> dict[str, str | tuple]:
    """ComfyUI's spellings of every layer that is there: it also lists FLUX's modulations for Chroma, which has none."""
    names, weights = comfy.lora.model_lora_keys_unet(model.model, {}), set(model.model.state_dict())
    if clip is not None:
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
        weights |= set(clip.cond_stage_model.state_dict())
    return {spelling: name for spelling, name in names.items() if place_of(name) in weights}


@dataclass(frozen=True)
class Fitted:
    """Patches for ``add_patches``, and the tensors that are in none."""

    patches: dict
    homeless: tuple[str, ...]


def fit(tensors: Mapping[str, Tensor], names: Mapping[str, object], *, with_text: bool) -> Fitted:
    """Tensors by ComfyUI's own rules. ``names``: its map of the spellings of every layer."""
    record = ReadingRecord(comfy.lora_convert.convert_lora(dict(tensors)))
    patches = comfy.lora.load_lora(record, names, log_missing=False)
    left = [key for key in record if key not in record.read and (with_text or not _is_text(key))]
    return Fitted(patches, tuple(left))


def place_of(name: str | tuple) -> str:
    """The weight that a patch is for; where it is for a part of it, ComfyUI's name is a tuple."""
    return name if isinstance(name, str) else name[0]


def missized(module: nn.Module, patches: Mapping[str | tuple, object]) -> list[str]:
    """The weights of ``module`` whose patches have other sizes.

    ComfyUI finds out when it applies them, logs it, and goes on without. Here each is applied to a weight of the same
    shape that holds no numbers; what ComfyUI adds to it passes through a function, which is reached where sizes agree.
    """
    weights = dict(module.named_parameters())
    found = dict.fromkeys(place_of(name) for name, patch in patches.items() if not _agrees(weights, name, patch))
    return list(found)


def _agrees(weights: Mapping[str, Tensor], name: str | tuple, patch: object) -> bool:
    weight = weights.get(place_of(name))
    if weight is None or not _adds(patch):
        return True
    reached = []

    def pass_on(addend: Tensor) -> Tensor:
        reached.append(True)
        return addend

    empty = torch.empty(weight.shape, device="meta")
    offset = None if isinstance(name, str) else name[1]
    comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, pass_on)], empty, place_of(name))
    return bool(reached)


def _adds(patch: object) -> bool:
    """Whether a patch is something added to a weight, and not a weight in its place."""
    return isinstance(patch, WeightAdapterBase) or (isinstance(patch, tuple) and patch[0] == "diff")


class ReadingRecord(dict):
    """Remembers which entries were taken out: ComfyUI looks for the names that a model has, and reads what it finds."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        super().__init__(entries)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)

    # Differences of weights are read so.
    def get(self, key: str, default: Any = None, /) -> Any:  # ty: ignore[incompatible-method-override]
        if key in self:
            self.read.add(key)
        return super().get(key, default)


def _is_text(key: str) -> bool:
    """Whether a tensor belongs to a text encoder."""
    spelled = read_key(key)
    return spelled is not None and spelled[0].startswith(TEXT_ENCODER)
