"""A LoRA for an adapter that acts by its input, from what passes while the model draws.

Seen is what the loader adds to layers, so that also a part of a layer that stacks several has a LoRA of its own.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ...training.adapters.approximation import MOST, Approximation, Positions, distance_of, lora_of
from ...training.adapters.methods import STYLE_INJECT
from ...training.data.cache import settle
from ...training.formats.approximating import approximated_file
from ...training.formats.keys import FAMILIES
from ...training.formats.layers import Layer
from ...training.formats.layouts import to_native
from ...training.randomness import generator
from .adapters import AdapterTensors, Strengths, apply_adapter, refuse_foreign, refuse_incomplete, refuse_non_finite
from .families import family_of, model_name
from .hooked import Placed, hook, placed_layers
from .sampling import Brush, draw_from
from .style_inject import StyleInject
from .windowed import windowed_adapters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """What is drawn: a KSampler's links."""

    positive: list
    negative: list
    latent: dict


def approximated(
    model: comfy.model_patcher.ModelPatcher, lora: AdapterTensors, scene: Scene, brush: Brush, rank: int
) -> tuple[AdapterTensors, str]:
    """The adapter as a LoRA of at most this rank, and what is lost. The model is afterwards what it was.

    ValueError for an adapter of another family, or one that needs none of this.
    """
    refuse_foreign(model, lora)
    refuse_non_finite(lora)
    refuse_incomplete(lora)
    if not lora.file.unmergeable:
        raise ValueError(f"{lora.name} is a change of weights already: it loads everywhere as it is")
    if methods := {layer.method for layer in lora.file.layers.values()} - {STYLE_INJECT}:
        raise ValueError(
            f"{lora.name} is a {methods.pop()} adapter, and this is for StyleInject: no LoRA is known for it"
        )
    family, placed = family_of(model), placed_layers(model, lora.file)
    if unfit := [*placed.homeless, *placed.missized]:
        raise ValueError(f"{lora.name} adapts layers that {model_name(model)} does not have so, such as {unfit[0]}")
    if _wears(model, placed):
        raise ValueError(f"the model has {lora.name} on it already, and is to be the one without it: link that model")
    positive, negative = (_settled(conditioning) for conditioning in (scene.positive, scene.negative))
    empty = settle(scene.latent["samples"])

    def draw(drawer: comfy.model_patcher.ModelPatcher) -> Tensor:
        return settle(draw_from(drawer, empty, positive, negative, brush).float())

    adapted = model.clone()
    hook(adapted, placed, dict.fromkeys(placed.weights, 1.0), None, logger.warning)
    with torch.inference_mode():
        fitted, drawn = _fitted(adapted, placed, rank, brush.seed, lambda: draw(adapted))
    layers = {name: layer for name, (layer, _) in fitted.items()}
    layers = to_native(layers, family, placed.about.unet_layers) if family in FAMILIES else layers
    state = {f"{name}.lora_{part}.weight": layer.tensors[part] for name, layer in layers.items() for part in "AB"}
    lost = {name: share for name, (_, share) in fitted.items()}
    found = Approximation(state, max(layer.rank or 0 for layer in layers.values()), lost, 0.0)
    made = AdapterTensors(approximated_file(lora.file, found))
    with torch.inference_mode():
        near = draw(apply_adapter(model, None, made, Strengths(), warn=logger.warning).model)
        found = replace(found, distance=distance_of(near, drawn, draw(model)))
    return AdapterTensors(approximated_file(lora.file, found)), found.summary()


def _wears(model: comfy.model_patcher.ModelPatcher, placed: Placed) -> bool:
    """Whether one of the adapters on a model has the down-projections of these layers, at whatever strength."""
    ours = {place: layer.tensors["styleinject_A"] for place, layer in placed.layers.values()}
    worn = [each for adapter in windowed_adapters(model) for each in adapter.terms if isinstance(each[1], StyleInject)]
    return any(place in ours and _same(term.get_parameter("a"), ours[place]) for place, term in worn)


def _same(worn: Tensor, own: Tensor) -> bool:
    return torch.equal(worn.cpu(), own.cpu().to(worn.dtype))


def _fitted(
    adapted: comfy.model_patcher.ModelPatcher, placed: Placed, rank: int, seed: int, draw: Callable[[], Tensor]
) -> tuple[dict[str, tuple[Layer, float]], Tensor]:
    """The nearest LoRA of each layer with the share that is lost, and what was drawn to see."""
    terms = [term for _, term in windowed_adapters(adapted)[-1].terms]
    fitted: dict[str, tuple[Layer, float]] = {}
    drawn = torch.zeros(0)
    for group in _groups(dict(zip(placed.layers, terms, strict=True))):
        seen = {}
        for name, term in group.items():
            module = adapted.model.get_submodule(placed.layers[name][0].layer)
            seen[name] = Positions(module, generator(seed, "positions", name))
            term.observe = seen[name].see
        drawn = draw()
        for name, term in group.items():
            term.observe = None
            if seen[name].rows:
                (a, b), lost = seen[name].fitted(rank)
                state = lora_of(name, a, b, seen[name].layer)
                fitted[name] = Layer("lora", {part: state[f"{name}.lora_{part}.weight"] for part in "AB"}), lost
    if not fitted:
        raise ValueError("none of the adapter's layers ran while pictures were drawn: it is for another model")
    return fitted, drawn


def _groups(terms: Mapping[str, Any], room: int = 2**31) -> list[dict[str, Any]]:
    """Layers whose positions fit into ``room`` bytes together."""
    groups: list[dict[str, Any]] = [{}]
    taken = 0
    for name, term in terms.items():
        size = 4 * MOST * (term.a[0, 0].numel() + len(term.b))
        if groups[-1] and taken + size > room:
            groups.append({})
            taken = 0
        groups[-1][name] = term
        taken += size
    return groups


def _settled(conditioning: list) -> list:
    """With tensors that are no inference tensors, which no code outside of that mode may write to."""
    return [
        [settle(text), {name: settle(v) if isinstance(v, torch.Tensor) else v for name, v in rest.items()}]
        for text, rest in conditioning
    ]
