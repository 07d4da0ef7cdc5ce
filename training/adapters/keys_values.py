"""Keys and values alone, where a layer computes them together with queries, or with each other.

FineStyle adapts the kernels of keys and values (NeurIPS 2024, pp. 52937-52961). diffusers has a layer for each; the
original layouts stack their rows in one, such as ``qkv``. There the two adapters are one LoRA of twice the rank,
[0; B_k 0; 0 B_v] [A_k; A_v], whose zeros get no gradient: what is trained, and what it does, is the same in either
layout. Likewise two bottlenecks are one of twice the width, and where layers share the rest their d are one vector.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

KV_TEXT, KV_BOTH = "kv_text", "kv_both"
PRESETS = (KV_TEXT, KV_BOTH)  # of targets
METHODS = ("lora", "rslora", "bottleneck")  # which have a part for every output

# Ends of names: of layers for keys or values alone, and of those that stack them.
SEPARATE = r"add_[kv]_proj|(?:\w*_)?to_[kv](?:_t)?(?:\.0)?|to_key|to_value|[kv]_proj|w[12]?[kv]|[kv]"
STACKED = r"qkv(?:_[xy])?|Wqkv|(?:img|txt)_(?:attn_)?qkv|kv_linear|kv_proj"
SINGLE = r"single_blocks\.\d+\.linear1"  # FLUX's: q, k, v and the first layer of an MLP

Rows = tuple[range, range]  # of keys, of values


def rows_of(name: str, inputs: int, outputs: int) -> Rows | None:
    """Where keys and values are among the outputs of the layer ``name``; None where it has nothing else to tell."""
    for ending, rows in _ROWS.items():
        if re.search(rf"(?:\A|\.)(?:{ending})\Z", name):
            return rows(inputs, outputs)
    return None


def stacked_rows(targets: Any, layers: Mapping[str, nn.Module]) -> dict[str, Rows]:
    """Of those layers that stack keys and values, by name, where ``targets`` is a preset for these."""
    if targets not in PRESETS:
        return {}
    return {name: rows for name, layer in layers.items() if (rows := rows_of(name, *_sides(layer)))}


def _sides(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, whatever its weights are packed in."""
    return layer.in_features, layer.out_features


def own_places(rows: Rows, outputs: int, rank: int) -> Tensor:
    """Where the second factor (outputs, 2 rank) of the two adapters in one may be other than zero."""
    places = torch.zeros(outputs, 2 * rank, dtype=torch.bool)
    for number, part in enumerate(rows):
        places[part.start : part.stop, number * rank : (number + 1) * rank] = True
    return places


def keep_to_rows(tensors: Mapping[str, nn.Parameter], layer: str, rows: Rows, rank: int) -> None:
    """Two adapters of the rank in one, by the names of their tensors, on these rows of ``layer``."""
    for name, turned in (("lora_B.weight", False), ("bottleneck_up", False), ("bottleneck_down", True)):
        tensor = tensors.get(f"{layer}.{name}")
        if tensor is not None:
            outputs = tensor.shape[1 if turned else 0]
            places = own_places(rows, outputs, rank)
            _keep_to(tensor, places.T if turned else places)
    vector = tensors.get(f"{layer}.bottleneck_d")
    if vector is not None:
        _keep_to(vector, own_places(rows, len(vector), 1).any(1))


def _keep_to(tensor: nn.Parameter, places: Tensor) -> None:
    """Elsewhere the tensor is zero, and gets no gradient, so that it stays so: weight decay does not move it."""
    tensor.data = tensor.data * places.to(tensor)
    tensor.register_hook(lambda gradient: gradient * places.to(gradient))


def _one_after_another(start: int, size: int) -> Rows:
    return range(start, start + size), range(start + size, start + 2 * size)


# Lumina and Z-Image may have fewer heads of keys and values than of queries, whose rows are as many as inputs; Mochi's
# text has fewer inputs than any of the three has rows.
_ROWS: dict[str, Callable[[int, int], Rows]] = {
    SINGLE: lambda inputs, outputs: _one_after_another(inputs, inputs),
    r"attention\.qkv": lambda inputs, outputs: _one_after_another(inputs, (outputs - inputs) // 2),
    r"kv_linear|kv_proj": lambda inputs, outputs: _one_after_another(0, outputs // 2),
    STACKED: lambda inputs, outputs: _one_after_another(outputs // 3, outputs // 3),
}
