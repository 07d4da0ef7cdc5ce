"""An adapter to begin training from, in the form that a run's own adapter has."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ..adapters.keys_values import PRESETS, Rows, rows_of
from ..adapters.methods import BOTTLENECK, UNMERGEABLE, AdapterConfig
from .adapters import LoadedAdapter
from .layers import Layer
from .resizing import Cut, resize_layer

LORAS = ("lora", "rslora", "dora")
# peft's ends of the names of products outer @ inner
PAIRS = {
    "lora": (("lora_B.weight", "lora_A.weight"),),
    "loha": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
}


@dataclass(frozen=True)
class Start:
    """Tensors under peft's names with the effect of another adapter, at a run's rank and scale."""

    name: str  # of the file
    state: Mapping[str, Tensor]
    layers: tuple[str, ...]
    said: str  # what was done to it
    one_step: Mapping[str, Any] = field(default_factory=dict)  # of a student, how it is called; {} = none

    @property
    def digest(self) -> str:
        """Tells one start from another: 12 hexadecimal digits."""
        found = sha256()
        for name in sorted(self.state):
            found.update(name.encode())
            found.update(self.state[name].detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:12]

    def joined(self, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The run's new tensors with these in their place. ValueError for layers that the run does not have.

        Where the adapter has less rank than the run, one side of the products stays the run's own: the other one is
        zero, so that they add nothing, and still they learn.
        """
        foreign = sorted(self.state.keys() - fresh.keys())
        if foreign:
            raise ValueError(
                f"{self.name} adapts layers that this run does not, such as {foreign[0]}: choose targets that hold "
                "all of its layers, or give them as patterns"
            )
        joined = dict(fresh)
        for name, tensor in self.state.items():
            if tensor.shape != fresh[name].shape:
                raise ValueError(
                    f"{self.name} has a tensor {name} of shape {tuple(tensor.shape)}, and this run's has "
                    f"{tuple(fresh[name].shape)}: it is for a model of another size, or was factored in another way"
                )
            joined[name] = tensor.to(fresh[name])
        for layer in self.layers:
            _revive(joined, fresh, layer)
        return joined


@dataclass(frozen=True)
class WholeStart:
    """All weights of a network, for a student to begin with that learns all of its own."""

    name: str  # of the file or the model
    state: Mapping[str, Tensor]  # by the network's names
    one_step: Mapping[str, Any] = field(default_factory=dict)  # of a student, how it is called; {} = none

    @property
    def digest(self) -> str:
        """Tells one from another by the sum of each tensor: 12 hexadecimal digits."""
        found = sha256()
        for name, tensor in sorted(self.state.items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item()!r}".encode())
        return found.hexdigest()[:12]


def start_of(loaded: LoadedAdapter, config: AdapterConfig, name: str) -> Start:
    """An adapter as a run of ``config`` has it: the same effect, exactly unless its rank has to be lowered.

    ValueError where there is no such form: of another method, or of a method whose rank cannot be changed.
    """
    _require_method(loaded, config, name)
    return replace(_of_method(loaded, config, name), one_step=loaded.about.one_step if loaded.about else {})


def _of_method(loaded: LoadedAdapter, config: AdapterConfig, name: str) -> Start:
    before = 1.0 if loaded.alpha is None else _scale(loaded.method, loaded.alpha, loaded.rank)
    after = 1.0 if config.method == "oft" else _scale(config.method, config.scale_alpha, config.rank)
    if config.method not in LORAS:
        state = _rescaled(loaded.state, before / after)
        state = _padded(state, "loha", config.rank) if config.method == "loha" else state
        return Start(name, state, loaded.names, f"begins with {name}")
    state, said = _rescaled(loaded.state, before / after), f"begins with {name}, of rank {loaded.rank}"
    if stacked := _stacked(state, loaded.names, config):
        return _of_keys_and_values(state, stacked, loaded, config.rank, name)
    if config.rank < loaded.rank:
        state, kept = _cut(state, loaded.names, config.rank)
        said += f", lowered to {config.rank}, which keeps {100 * kept:.4g} % of the layer that loses most"
    elif config.rank > loaded.rank:
        state = _padded(state, "lora", config.rank)
        said += f", raised to {config.rank}"
    return Start(name, state, loaded.names, said)


def _stacked(state: Mapping[str, Tensor], names: tuple[str, ...], config: AdapterConfig) -> dict[str, Rows]:
    """Of those layers on which the run has two adapters in one, for keys and for values."""
    if config.targets not in PRESETS:
        return {}
    sizes = {name: [state[f"{name}.{end}"].shape for end in PAIRS["lora"][0]] for name in names}
    return {name: rows for name, (b, a) in sizes.items() if (rows := rows_of(name, a[1], b[0]))}


def _of_keys_and_values(
    state: Mapping[str, Tensor], stacked: Mapping[str, Rows], loaded: LoadedAdapter, rank: int, name: str
) -> Start:
    """Each of the two at the rank, and so the other layers."""
    plain, least = tuple(each for each in loaded.names if each not in stacked), 1.0
    found, kept = _cut(state, plain, rank) if rank < loaded.rank else (_padded(state, "lora", rank), 1.0)
    for layer, rows in stacked.items():
        b, a = (f"{layer}.{end}" for end in PAIRS["lora"][0])
        rest = torch.ones(len(state[b]), dtype=torch.bool)
        for part in rows:
            rest[part.start : part.stop] = False
        if state[b][rest].any():
            raise ValueError(
                f"{name} adapts more of the layer {layer} than keys and values, which are all that this run adapts: "
                "choose other targets, or another adapter to begin with"
            )
        parts = [_at_own_rank(state[a], state[b][part.start : part.stop], rank) for part in rows]
        least = min(least, *(share for _, share in parts))
        found[a] = torch.cat([part["A"] for part, _ in parts])
        found[b] = state[b].new_zeros(len(state[b]), 2 * rank)
        for number, (part, places) in enumerate(zip(parts, rows, strict=True)):
            found[b][places.start : places.stop, number * rank : (number + 1) * rank] = part[0]["B"]
    said = (
        f"begins with {name}, keys and values at rank {rank}, which keeps {100 * min(least, kept):.4g} % of the layer"
    )
    return Start(name, found, loaded.names, f"{said} that loses most")


def _at_own_rank(a: Tensor, b: Tensor, rank: int) -> tuple[dict[str, Tensor], float]:
    """Two factors at the rank, and the share that is kept: all, and the very numbers, where they use no more of it."""
    own = b.any(0)
    if own.sum() <= rank:
        return _at_rank(Layer("lora", {"A": a[own], "B": b[:, own]}), rank), 1.0
    small, kept = resize_layer(Layer("lora", {"A": a, "B": b}), Cut(value=rank))
    return _at_rank(small, rank), kept


def _require_method(loaded: LoadedAdapter, config: AdapterConfig, name: str) -> None:
    plain = ("lora", "rslora")
    if loaded.method != config.method and not (loaded.method in plain and config.method in plain):
        raise ValueError(
            f"{name} is a {loaded.method} adapter, and this run trains {config.method}: choose the method "
            f"{loaded.method}, or another adapter to begin with"
        )
    options = loaded.options
    if options != config.options:
        raise ValueError(
            f"{name} has {options}, and this run {config.options}: they cannot be changed, choose the same"
        )
    fixed = config.method in ("oft", "lokr", *UNMERGEABLE) or (config.method == "loha" and config.rank < loaded.rank)
    # Two bottlenecks in one, for keys and for values, are of twice the rank.
    rank = loaded.about.rank if loaded.about and config.method == BOTTLENECK else loaded.rank
    if fixed and rank != config.rank:
        raise ValueError(
            f"{name} is a {loaded.method} adapter of rank {rank}, and this run has {config.rank}: the rank of this "
            f"method cannot be changed to it, choose {rank}"
        )


def _scale(method: str, alpha: float, rank: int) -> float:
    return alpha / rank**0.5 if method == "rslora" else alpha / rank


def _rescaled(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The factor goes into one tensor of each layer."""
    ends = ("lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "styleinject_B", "bottleneck_up")
    ends += ("bottleneck_u", "bottleneck_shared_up")
    return {name: value * factor if name.endswith(ends) else value for name, value in state.items()}


def _padded(state: Mapping[str, Tensor], kind: str, rank: int) -> dict[str, Tensor]:
    """Zeros up to the rank."""
    padded = dict(state)
    for outer, inner in PAIRS[kind]:
        for name, value in state.items():
            if name.endswith(f".{inner}"):
                padded[name] = torch.cat([value, value.new_zeros(rank - len(value), *value.shape[1:])])
            elif name.endswith(f".{outer}"):
                more = value.new_zeros(len(value), rank - value.shape[1], *value.shape[2:])
                padded[name] = torch.cat([value, more], dim=1)
    return padded


def _cut(state: Mapping[str, Tensor], layers: tuple[str, ...], rank: int) -> tuple[dict[str, Tensor], float]:
    cut, least = dict(state), 1.0
    for layer in layers:
        b, a = (f"{layer}.{end}" for end in PAIRS["lora"][0])
        small, kept = resize_layer(Layer("lora", {"A": state[a], "B": state[b]}), Cut(value=rank))
        small = _at_rank(small, rank)
        cut |= {a: small["A"], b: small["B"]}
        least = min(least, kept)
    return cut, least


def _at_rank(layer: Layer, rank: int) -> dict[str, Tensor]:
    """Zeros where the layer has less."""
    state = _padded({"x.lora_A.weight": layer.tensors["A"], "x.lora_B.weight": layer.tensors["B"]}, "lora", rank)
    return {"A": state["x.lora_A.weight"], "B": state["x.lora_B.weight"]}


def _revive(joined: dict[str, Tensor], fresh: Mapping[str, Tensor], layer: str) -> None:
    """Rows that are zero on both sides of a product would stay so for ever: their gradients are zero, too."""
    for pairs in PAIRS.values():
        for outer, inner in ((f"{layer}.{outer}", f"{layer}.{inner}") for outer, inner in pairs):
            if outer not in joined or inner not in joined:
                continue
            alive = joined[inner].flatten(1).any(1) | joined[outer].transpose(0, 1).flatten(1).any(1)
            if fresh[inner].any():
                rows = alive.reshape(-1, *[1] * (joined[inner].dim() - 1))
                joined[inner] = torch.where(rows, joined[inner], fresh[inner])
            else:  # LoHa's second product, of which the other side is drawn
                columns = alive.reshape(1, -1, *[1] * (joined[outer].dim() - 2))
                joined[outer] = torch.where(columns, joined[outer], fresh[outer])
