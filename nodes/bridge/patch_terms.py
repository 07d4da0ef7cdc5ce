"""ComfyUI's patches as terms (:mod:`.terms`): every kind of its weight adapters, on linear layers and convolutions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from comfy.weight_adapter import (
    BOFTAdapter,
    GLoRAAdapter,
    LoHaAdapter,
    LoKrAdapter,
    LoRAAdapter,
    OFTAdapter,
    WeightAdapterBase,
)
from torch import Tensor

from ...training.formats.layers import Layer
from ...training.formats.spelling import read_alpha
from .terms import Bias, Decomposed, Dense, Inputs, Kronecker, LowRank, Outputs, Product, Term, is_convolution


@dataclass(frozen=True)
class Place:
    """The part of a layer that a patch is for."""

    layer: str  # its name within the whole model, ``diffusion_model.…``
    parameter: str  # "weight" or "bias"
    rows: tuple[int, int] | None  # (start, length) of its outputs; None = all
    function: Callable[[Tensor], Tensor] | None  # that ComfyUI puts a difference through: a new order of rows


class Unpatched:
    """The weights of a model as the nodes before left them, for the few kinds of adapter that need to know them."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher) -> None:
        self._model = model

    @cached_property
    def _patches(self) -> dict:
        return self._model.get_key_patches("diffusion_model.")

    def tensor(self, key: str) -> Tensor | None:
        """In float32 on the CPU; None where there is no such weight."""
        if key not in self._patches:
            return None
        patches = self._patches[key]
        zero = torch.zeros(patches[0][0].shape)
        return comfy.lora.calculate_weight([(1.0, patches, 1.0, None, None)], zero, key)


class Unfit(ValueError):
    """A patch that cannot act at some noise levels only."""


def place_of_patch(name: str | tuple) -> Place:
    """A key of ``add_patches``, taken apart. :class:`Unfit` for a part of a layer that is not some of its outputs."""
    key: str = name if isinstance(name, str) else name[0]
    offset, function = (None, None) if isinstance(name, str) else (*name[1:], None)[:2]
    layer, _, parameter = key.rpartition(".")
    if offset is not None and offset[0] != 0:
        raise Unfit(f"a part of the inputs of {layer} is meant")
    return Place(layer, parameter, None if offset is None else (offset[1], offset[2]), function)


@dataclass(frozen=True)
class Site:
    """Where a term is to act, and how."""

    place: Place
    layer: Any  # a module
    strength: float
    base: Unpatched
    dtype: torch.dtype  # that the model computes in

    @property
    def outputs(self) -> int:
        """Rows of the layer that the term is for."""
        if self.place.rows:
            return self.place.rows[1]
        return self.layer.out_channels if is_convolution(self.layer) else self.layer.out_features

    @property
    def inputs(self) -> int:
        return self.layer.in_channels if is_convolution(self.layer) else self.layer.in_features

    def tensor(self, parameter: str) -> Tensor | None:
        """The layer's own weight or bias, these rows of it."""
        found = self.base.tensor(f"{self.place.layer}.{parameter}")
        return found if found is None or self.place.rows is None else found.narrow(0, *self.place.rows)


def term_of(site: Site, patch: object) -> Term:
    """What a patch adds to the output of a layer. :class:`Unfit` where it has no such form."""
    if not (is_convolution(site.layer) or {"in_features", "out_features"} <= vars(site.layer).keys()):
        raise Unfit(f"{site.place.layer} is a {type(site.layer).__name__}, neither linear nor a convolution")
    if isinstance(patch, tuple):
        return _difference(site, patch)
    if type(patch) not in _ADAPTERS:
        raise Unfit(f"{site.place.layer} has a {type(patch).__name__}, which has no such form")
    if site.place.function is not None and not isinstance(patch, LoRAAdapter):
        raise Unfit(f"the rows of {site.place.layer} would have to change places")
    return _ADAPTERS[type(patch)](site, patch)


def _difference(site: Site, patch: tuple) -> Term:
    kind, values = patch if len(patch) == 2 else ("diff", patch[0])
    if kind != "diff" or len(values) > 1 or site.place.function is not None:
        raise Unfit(f"the {site.place.parameter} of {site.place.layer} is replaced")
    if site.place.parameter == "bias":
        return Bias({"bias": site.strength * values[0].float().flatten()}, site.dtype)
    return Dense({"weight": site.strength * values[0].float()}, site.dtype)


def _lora(site: Site, patch: LoRAAdapter) -> Term:
    up, down, alpha, middle, dora, reshape = patch.weights
    if reshape is not None:
        raise Unfit(f"{site.place.layer} becomes larger")
    if middle is not None:  # LoCon's core (r, r', k, k) between two 1x1 convolutions
        down = torch.einsum("or...,ri->oi...", middle.float(), down.float().flatten(1))
    up = up.float() if site.place.function is None else site.place.function(up.float())
    return _factored(site, Layer("lora", {"A": down.float(), "B": up}), alpha, dora)


def _loha(site: Site, patch: LoHaAdapter) -> Term:
    w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, dora = patch.weights
    tensors = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
    return _factored(site, Layer("loha", _given(**tensors, hada_t1=t1, hada_t2=t2)), alpha, dora)


def _lokr(site: Site, patch: LoKrAdapter) -> Term:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, dora = patch.weights
    first = {"lokr_w1": w1, "lokr_w1_a": w1_a, "lokr_w1_b": w1_b}
    second = {"lokr_w2": w2, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "lokr_t2": t2}
    return _factored(site, Layer("lokr", _given(**first, **second)), alpha, dora)


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items() if tensor is not None}


def _factored(site: Site, factors: Layer, alpha: float | None, dora: Tensor | None) -> Term:
    scale = read_alpha(factors.method, factors.tensors, None if alpha is None else torch.tensor(alpha))
    if dora is None:
        return _sum(site, replace(factors, scale=scale * site.strength))
    weight = site.tensor("weight")
    if weight is None or len(dora) != len(weight):
        raise Unfit(f"the DoRA of {site.place.layer} scales inputs")
    norms = weight.flatten(1).norm(dim=1) + torch.finfo(torch.float32).eps
    tensors = _given(ratio=dora.float().flatten() / norms, bias=site.tensor("bias"))
    return Decomposed(_sum(site, replace(factors, scale=scale)), tensors, site.strength, site.dtype)


def _sum(site: Site, factors: Layer) -> Term:
    """The cheapest form of x -> scale * (product of the factors) x."""
    tensors, scale, convolution = factors.tensors, factors.scale, is_convolution(site.layer)
    if factors.method == "lora" and not (convolution and site.layer.groups != 1):
        return LowRank({"a": tensors["A"], "b": scale * tensors["B"].flatten(1)}, site.dtype)
    if factors.method == "lokr" and not convolution:
        first = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        second = {
            f"second{name.removeprefix('lokr_w2')}": value.flatten(1)
            for name, value in tensors.items()
            if name.startswith("lokr_w2")
        }
        return Kronecker({"first": scale * first, **second}, site.dtype)
    return Product(factors, site.dtype)


def _glora(site: Site, patch: GLoRAAdapter) -> Term:
    a1, a2, b1, b2, alpha, dora = patch.weights
    if dora is not None or site.place.rows is not None or alpha is not None:
        raise Unfit(f"the GLoRA of {site.place.layer} has a scale, or is for a part of it")
    if len(a1) != site.inputs:  # LyCORIS' old order
        a1, a2, b1, b2 = a2, a1, b2, b1
    adds = bool(b1.any()) and bool(b2.any())
    inner = LowRank({"a": b2, "b": site.strength * b1.float().flatten(1)}, site.dtype) if adds else None
    return Inputs({"a1": site.strength * a1.float(), "a2": a2}, inner, site.dtype)


def _rotation(site: Site, patch: OFTAdapter | BOFTAdapter) -> Term:
    """ComfyUI's own rotations act on the rows of a weight: on those of a unit matrix, they show what they are."""
    unit = torch.eye(site.outputs)
    turned = comfy.lora.calculate_weight([(site.strength, patch, 1.0, None, None)], unit.clone(), site.place.layer)
    rows = turned - unit
    if patch.weights[3] is not None or not rows.any():
        raise Unfit(f"ComfyUI cannot apply the rotation of {site.place.layer}")
    return Outputs(_given(rows=rows, bias=site.tensor("bias")), site.dtype)


_ADAPTERS: Mapping[type[WeightAdapterBase], Callable[..., Term]] = {
    LoRAAdapter: _lora,
    LoHaAdapter: _loha,
    LoKrAdapter: _lokr,
    GLoRAAdapter: _glora,
    OFTAdapter: _rotation,
    BOFTAdapter: _rotation,
}
