"""Adapters on a MODEL: what a file holds, where it fits, and what of it found no place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.sd
from torch import Tensor

from ...training.formats.contents import AdapterFile, read_adapter, read_layers
from ...training.formats.keys import FAMILIES, TEXT_ENCODER, UNET_LAYERS
from ...training.formats.metadata import NORM_KEY
from ...training.formats.spelling import read_key
from ...training.formats.styles import MERGED, styled
from .families import OTHER, family_of, model_name


class AdapterTensors(dict):
    """LORA_MODEL: tensors by key, as ComfyUI's own nodes take them, with what their file says of them."""

    def __init__(self, file: AdapterFile) -> None:
        super().__init__(file.tensors)
        self.file = file

    @property
    def name(self) -> str:
        """For messages."""
        return self.file.path.name

    @property
    def style_phrase(self) -> str:
        return self.file.about.style_phrase if self.file.about else ""


@dataclass(frozen=True)
class Applied:
    """A model and a text encoder with an adapter on them."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP | None
    layers: int  # that the adapter changes
    homeless: tuple[str, ...]  # tensors that found no place


def read_tensors(path: Path) -> AdapterTensors:
    """An adapter's file. ValueError names one that is truncated, foreign, or of a newer version."""
    return AdapterTensors(read_adapter(path))


def with_origin(lora: Mapping[str, Tensor]) -> AdapterTensors:
    """What a link carries: our own trainer's, or the plain dict of ComfyUI's."""
    if isinstance(lora, AdapterTensors):
        return lora
    layers, unknown = read_layers(lora)
    return AdapterTensors(AdapterFile(Path("the linked adapter"), {}, None, layers, tuple(unknown), lora))


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
    fitted = fit(lora, names, with_text=clip is not None)
    if fitted.homeless and lora.file.family in FAMILIES:
        # ComfyUI drops what it cannot spell, such as the attention layers of diffusers' files for SD1.5 and SDXL.
        fitted = min(fitted, fit(respelled(lora, model), names, with_text=clip is not None), key=_homeless)
    model = model.clone()
    placed = set(model.add_patches(fitted.patches, strength_model))
    if clip is not None:
        clip = clip.clone()
        placed |= set(clip.add_patches(fitted.patches, strength_clip))
    if not placed:
        shown = ", ".join(list(lora)[:3])
        raise ValueError(f"nothing of {lora.name} fits {model_name(model)}: its tensors are {shown}, …")
    return Applied(model, clip, len(placed), fitted.homeless)


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


class ReadingRecord(dict):
    """Remembers which entries were taken out: ComfyUI looks for the names that a model has, and reads what it finds."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        super().__init__(entries)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


def respelled(lora: AdapterTensors, model: comfy.model_patcher.ModelPatcher) -> dict[str, Tensor]:
    """The same adapter under the names that ComfyUI knows for every family, its own."""
    file = lora.file
    return styled(
        file.layers,
        "comfyui",
        file.family or "",
        norm=file.header.get(NORM_KEY, MERGED),
        weights=weights_of(model),
        unet_layers=file.about.unet_layers if file.about else UNET_LAYERS,
    ).tensors


def weights_of(model: comfy.model_patcher.ModelPatcher) -> Callable[[str], Tensor]:
    """The weight of a layer by its name, in float32 on the CPU. What is loaded counts, patches included."""

    def weight(name: str) -> Tensor:
        return model.model.diffusion_model.get_submodule(name).weight.detach().float().cpu()

    return weight


def _homeless(fitted: Fitted) -> int:
    return len(fitted.homeless)


def _is_text(key: str) -> bool:
    """Whether a tensor belongs to a text encoder."""
    spelled = read_key(key)
    return spelled is not None and spelled[0].startswith(TEXT_ENCODER)


def _refuse_foreign(model: comfy.model_patcher.ModelPatcher, lora: AdapterTensors) -> None:
    family, theirs = family_of(model), lora.file.family
    if theirs not in (None, OTHER, family) and not (family == OTHER and theirs not in FAMILIES):
        raise ValueError(
            f"{lora.name} is an adapter for the family {theirs!r}, and this model is a {model_name(model)} of the "
            f"family {family!r}: choose an adapter that was trained on such a model"
        )
