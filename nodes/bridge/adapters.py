"""Adapters on a MODEL: what a file holds, where it fits, and what of it found no place."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...training.adapters.groups import groups_of, layer_strengths
from ...training.adapters.methods import UNMERGEABLE
from ...training.data.captions import listed
from ...training.formats.contents import AdapterFile, read_adapter, read_layers
from ...training.formats.keys import FAMILIES, TEXT_ENCODER, UNET_LAYERS
from ...training.formats.metadata import NORM_KEY
from ...training.formats.spelling import read_key
from ...training.formats.styles import MERGED, styled
from ...training.windows import Window
from .families import OTHER, family_of, model_name
from .files import adapter_path
from .fitting import Fitted, fit, missized, place_of, spellings
from .frozen_layers import ComfyWeights
from .hooked import hook, placed_layers
from .students import mark
from .text_encoders import has_clip, trainable_text_encoders
from .windowed import act_within


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
    missized: tuple[str, ...]  # layers whose sizes are others than the adapter's
    idle: tuple[str, ...]  # groups with a strength of their own, of which the adapter has no layer
    left_out: int  # layers for a text encoder, where none is linked


@dataclass(frozen=True)
class Strengths:
    """How much of an adapter, where, and at which noise levels."""

    model: float = 1.0
    clip: float = 1.0
    groups: Mapping[str, float] = field(default_factory=dict)  # a factor by group or part of a name (adapters/groups)
    window: Window | None = None  # None = at all noise levels, as patches of the weights

    def __post_init__(self) -> None:
        named = {"strength_model": self.model, "strength_clip": self.clip, **self.groups}
        if bad := [f"{name} = {value}" for name, value in named.items() if not math.isfinite(value)]:
            raise ValueError(f"{listed(bad)}: expected a number, 1 for an adapter as it was trained")


def read_tensors(path: Path) -> AdapterTensors:
    """An adapter's file. ValueError names one that is truncated, foreign, or of a newer version."""
    return AdapterTensors(read_adapter(path))


def chosen(name: str | None, lora: Mapping[str, Tensor] | None) -> AdapterTensors:
    """The adapter of a file in models/loras, or of a link. ValueError where there are both or none."""
    if name is not None and lora is None:
        return read_tensors(adapter_path(name))
    if name is None and lora is not None:
        return with_origin(lora)
    if name is None:
        raise ValueError("there is no adapter: choose a file in lora_name, or link one to the lora input")
    raise ValueError(
        f"there are two adapters, the file {name} and the linked one: set lora_name to its first entry, or take the "
        "link away"
    )


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
    strengths: Strengths,
    *,
    warn: Callable[[str], None],
) -> Applied:
    """Clones with the adapter on them. ValueError for one of another family, or of which nothing fits.

    ``warn`` takes what turns out while sampling.
    """
    refuse_foreign(model, lora)
    refuse_non_finite(lora)
    refuse_incomplete(lora)
    if lora.file.unmergeable:
        return _apply_hooked(model, clip, lora, strengths, warn)
    names = spellings(model, clip)
    fitted = fit(lora, names, with_text=clip is not None)
    # Families share names of layers (Chroma has FLUX's). What does not say its family is taken if all of it fits.
    reason = foreignness(model, lora)
    known = family_of(model) in FAMILIES  # whose names are told from others'
    if fitted.homeless and reason and known:
        raise ValueError(reason)
    if fitted.homeless and lora.file.family in FAMILIES:
        # ComfyUI drops what it cannot spell, such as the attention layers of diffusers' files for SD1.5 and SDXL.
        with suppress(ValueError):  # a layer that the family does not have: said below, with the others
            fitted = min(fitted, fit(respelled(lora, model, clip), names, with_text=clip is not None), key=_homeless)
    if reason and not known and not _mostly_fits(model, lora, fitted):
        raise ValueError(reason)
    wrong = missized(model.model, fitted.patches)
    if clip is not None:
        wrong += missized(clip.cond_stage_model, fitted.patches)
    if wrong and reason and known:
        raise ValueError(reason)
    patches = {name: patch for name, patch in fitted.patches.items() if place_of(name) not in wrong}
    model = model.clone()
    groups = groups_of(layer_names(model))
    factors = layer_strengths(groups, strengths.groups)
    weights = {name: strengths.model * factors.get(layer_of(name), 1.0) for name in patches}
    placed = _put(model, patches, weights, strengths.window, warn)
    if clip is not None:
        clip = clip.clone()
        placed |= set(clip.add_patches(patches, strengths.clip))
    if not placed:
        raise ValueError(_nothing_fits(model, lora, wrong))
    adapted = {layer_of(name) for name in placed}
    idle = [pattern for pattern in strengths.groups if adapted.isdisjoint(groups.layers(pattern))]
    left_out = 0 if clip is not None else sum(name.startswith(TEXT_ENCODER) for name in lora.file.layers)
    mark(model, lora.name, lora.file.about)
    return Applied(model, clip, len(placed), fitted.homeless, tuple(wrong), tuple(idle), left_out)


def _apply_hooked(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP | None,
    lora: AdapterTensors,
    strengths: Strengths,
    warn: Callable[[str], None],
) -> Applied:
    """The same of an adapter that no patch of weights can express. It changes no text encoder."""
    groups = groups_of(layer_names(model))
    factors = layer_strengths(groups, strengths.groups)
    placed = placed_layers(model, lora.file)
    if not placed.layers:
        raise ValueError(_nothing_fits(model, lora, list(placed.missized)))
    model = model.clone()
    weights = {name: strengths.model * factors.get(layer_of(name), 1.0) for name in placed.weights}
    hook(model, placed, weights, strengths.window, warn)
    adapted = set(map(layer_of, placed.weights))
    idle = [pattern for pattern in strengths.groups if adapted.isdisjoint(groups.layers(pattern))]
    clip = clip and clip.clone()
    return Applied(model, clip, len(placed.layers), placed.homeless, placed.missized, tuple(idle), left_out=0)


def _mostly_fits(model: comfy.model_patcher.ModelPatcher, lora: AdapterTensors, fitted: Fitted) -> bool:
    """Whether at least half of an adapter's layers have a place in the model."""
    weights = model.model.state_dict().keys()
    fitting = sum(place_of(name) in weights for name in fitted.patches)
    return 2 * fitting >= sum(not name.startswith(TEXT_ENCODER) for name in lora.file.layers)


def _put(
    model: comfy.model_patcher.ModelPatcher,
    patches: Mapping[str | tuple, object],
    weights: Mapping[str | tuple, float],
    window: Window | None,
    warn: Callable[[str], None],
) -> set[str | tuple]:
    """Patches on a clone of ours, by strength. Gives those that belong there, those of strength 0 included."""
    known = model.model.state_dict().keys()
    here = {name: patch for name, patch in patches.items() if place_of(name) in known}
    acting = {name: patch for name, patch in here.items() if weights[name]}
    if window is not None and acting:
        act_within(model, {name: (patch, weights[name]) for name, patch in acting.items()}, window, warn)
    elif acting:
        for strength in dict.fromkeys(weights[name] for name in acting):
            model.add_patches({name: acting[name] for name in acting if weights[name] == strength}, strength)
    return set(here)


def layer_names(model: comfy.model_patcher.ModelPatcher) -> list[str]:
    """Everything with a weight in the diffusion model, in its order."""
    weights = model.model.diffusion_model.named_parameters()
    return [name.removesuffix(".weight") for name, _ in weights if name.endswith(".weight")]


def layer_of(name: str | tuple) -> str:
    """The layer of the diffusion model that a patch is for; another module's keeps its whole name."""
    return place_of(name).removeprefix("diffusion_model.").rpartition(".")[0]


def _nothing_fits(model: comfy.model_patcher.ModelPatcher, lora: AdapterTensors, wrong: list[str]) -> str:
    if not wrong:
        return f"nothing of {lora.name} fits {model_name(model)}: its tensors are {', '.join(list(lora)[:3])}, …"
    size = tuple(comfy.utils.get_attr(model.model, wrong[0]).shape)
    return (
        f"{lora.name} is for a {model_name(model)} of another size: none of its {len(wrong)} layers has this model's, "
        f"such as {size} of {wrong[0]}. Choose an adapter that was trained on this model"
    )


def respelled(
    lora: AdapterTensors, model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None
) -> dict[str, Tensor]:
    """The same adapter under the names that ComfyUI knows for every family, its own."""
    file = lora.file
    return styled(
        file.layers,
        "comfyui",
        file.family or "",
        norm=file.header.get(NORM_KEY, MERGED),
        weights=weights_of(model, clip),
        unet_layers=file.about.unet_layers if file.about else UNET_LAYERS,
    ).tensors


def weights_of(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None = None) -> Callable[[str], Tensor]:
    """The weight of a layer by its name, in float32 on the CPU. What is loaded counts, patches included."""
    encoders = trainable_text_encoders(clip) if clip is not None and has_clip(clip) else {}

    def weight(name: str) -> Tensor:
        prefix = next((prefix for prefix in encoders if name.startswith(prefix)), "")
        layer = encoders.get(prefix, model.model.diffusion_model).get_submodule(name.removeprefix(prefix))
        weights = ComfyWeights(clip.patcher.load_device if clip is not None and prefix else model.load_device)
        with torch.no_grad(), weights.dense(layer, torch.float32, layer.get_parameter("weight").device) as dense:
            return dense.weight.detach().to("cpu", copy=True)

    return weight


def _homeless(fitted: Fitted) -> int:
    return len(fitted.homeless)


def refuse_incomplete(lora: AdapterTensors) -> None:
    """ValueError for a layer of which some of the tensors that belong together are there and others are not."""
    spelled = filter(None, map(read_key, lora.file.unknown))
    known = {name for name, part in spelled if part in ("A", "B") or part.startswith(UNMERGEABLE)}
    if broken := sorted(known - lora.file.layers.keys()):
        raise ValueError(
            f"{lora.name} is damaged: of {listed(broken)} one of the tensors that belong together is missing. Copy or "
            "train it again"
        )


def refuse_non_finite(lora: AdapterTensors) -> None:
    """ValueError for an adapter with values that are no numbers."""
    # One by one in float32: torch cannot ask float8 whether it is finite.
    bad = [key for key, tensor in lora.items() if not bool(tensor.float().isfinite().all())]
    if bad:
        raise ValueError(
            f"{lora.name} holds NaN or infinite values, in {listed(bad)}: its training went wrong, or it was damaged"
        )


def refuse_foreign(model: comfy.model_patcher.ModelPatcher, lora: AdapterTensors) -> None:
    """ValueError for an adapter that says it is of another family than the model's."""
    if lora.file.states_family and (reason := foreignness(model, lora)):
        raise ValueError(reason)


def foreignness(model: comfy.model_patcher.ModelPatcher, lora: AdapterTensors) -> str | None:
    """Why an adapter is not for this model, as far as families tell: as it says, or as its names look."""
    family, theirs = family_of(model), lora.file.family
    if theirs in (None, OTHER, family) or (family == OTHER and theirs not in FAMILIES):
        return None
    is_for = "is an adapter for" if lora.file.states_family else "is, by the names of its layers, an adapter for"
    return (
        f"{lora.name} {is_for} the family {theirs!r}, and this model is a {model_name(model)} of the "
        f"family {family!r}: choose an adapter that was trained on such a model"
    )
