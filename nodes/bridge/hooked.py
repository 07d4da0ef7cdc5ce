"""Adapters that cannot be merged into weights, on a MODEL: their layers as terms at the places that files name.

A method joins by a line in :data:`TERMS`: what it adds to a layer's output, from the layer's tensors in the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch

from ...training.formats.contents import AdapterFile
from ...training.formats.keys import FAMILIES, UNET_LAYERS, native_place
from ...training.formats.layers import Layer
from ...training.formats.layouts import to_native
from ...training.formats.metadata import AdapterMetadata
from ...training.windows import Window
from .bottleneck import Bottleneck
from .families import family_of
from .noise_levels import levels_of
from .patch_terms import Place
from .style_inject import StyleInject
from .terms import Term, is_convolution
from .windowed import put_terms

NETWORK = "diffusion_model."

# method -> (layer of the file, place, what the file says, family, strength, the model's type) -> term
TERMS: Mapping[str, Callable[[Layer, Place, AdapterMetadata, str, float, torch.dtype], Term]] = {
    "styleinject": StyleInject.of_layer,
    "bottleneck": Bottleneck.of_layer,
}


@dataclass(frozen=True)
class Placed:
    """Where an adapter's layers belong in a model."""

    about: AdapterMetadata
    layers: Mapping[str, tuple[Place, Layer]]  # by their names in the file's layout
    homeless: tuple[str, ...]  # tensors of layers that the model does not have
    missized: tuple[str, ...]  # weights whose sizes are others than the adapter's

    @property
    def weights(self) -> list[str]:
        return [f"{place.layer}.weight" for place, _ in self.layers.values()]


def placed_layers(model: comfy.model_patcher.ModelPatcher, file: AdapterFile) -> Placed:
    """The places of a file's layers. ValueError for one that does not say what it is."""
    if file.about is None:
        raise ValueError(
            f"{file.path.name} has no metadata, and without them nobody knows how its layers act: copy it whole"
        )
    family, layers, places, homeless, missized = family_of(model), dict(file.layers), {}, [], []
    unet_layers = file.about.unet_layers if file.about else UNET_LAYERS
    if family in FAMILIES:
        layers = to_native(layers, family, unet_layers)
    modules = dict(model.model.diffusion_model.named_modules())
    for name, layer in layers.items():
        native = native_place(family, name, unet_layers) if family in FAMILIES and name not in modules else None
        module = modules.get(native.module if native else name)
        if module is None or layer.method not in TERMS:
            homeless += [f"{name}.{part}" for part in layer.tensors]
            continue
        rows = _rows(layer, native.part, native.parts) if native else None
        place = Place(f"{NETWORK}{native.module if native else name}", "weight", rows, None)
        if _fits(module, layer, rows):
            places[name] = (place, layer)
        else:
            missized.append(f"{place.layer}.weight")
    return Placed(file.about, places, tuple(homeless), tuple(dict.fromkeys(missized)))


def hook(
    model: comfy.model_patcher.ModelPatcher,
    placed: Placed,
    strengths: Mapping[str, float],  # by weight; those of 0 are left away
    window: Window | None,
    warn: Callable[[str], None],
) -> None:
    """Puts the layers on a clone of ours, to act in ``window``, or at all noise levels."""
    if window is not None:
        levels_of(model.get_model_object("model_sampling"))  # noise that has no log_snr is refused here
    dtype, family, terms = model.model.get_dtype_inference(), family_of(model), []
    for place, layer in placed.layers.values():
        if strength := strengths[f"{place.layer}.weight"]:
            terms.append((place, TERMS[layer.method](layer, place, placed.about, family, strength, dtype)))
    if terms:
        put_terms(model, terms, window, warn)


def _rows(layer: Layer, part: int, parts: int) -> tuple[int, int] | None:
    """(start, length) of a part's outputs in a layer that stacks several, each as large as its input but the last."""
    return None if parts == 1 else (part * layer.inputs, layer.outputs)


def _fits(module: Any, layer: Layer, rows: tuple[int, int] | None) -> bool:
    if is_convolution(module):
        inputs, outputs = module.in_channels, module.out_channels
    elif {"in_features", "out_features"} <= vars(module).keys():
        inputs, outputs = module.in_features, module.out_features
    else:
        return False
    fits = layer.outputs == outputs if rows is None else sum(rows) <= outputs
    return fits and (layer.inputs == inputs or layer.method == "bottleneck")
