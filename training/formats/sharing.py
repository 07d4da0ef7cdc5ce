"""Bottlenecks that share their projections, in files: each layer's vectors, and once what the layers of a width share.

Read, every layer has factors of its own, like a bottleneck that shares nothing, and so it fits wherever those do. What
is shared stays so for training it further, in the layout that it was trained in.
"""

from collections.abc import Mapping

from torch import Tensor

from ..bottleneck import own_factors
from .keys import TEXT_ENCODER
from .layers import Layer

D, U, DOWN, UP = (f"bottleneck_{part}" for part in ("d", "u", "shared_down", "shared_up"))
OWN, SHARED = frozenset({D, U}), frozenset({DOWN, UP})
SCALED = (UP, U)  # what the sum is multiplied by a number with


def unshared(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Layer]:
    """Of layers' tensors by our names those that share, with the factors of their own. Incomplete ones are left out."""
    pairs = [(_tree(name), parts[DOWN], parts[UP]) for name, parts in found.items() if parts.keys() >= SHARED]
    layers = {}
    for name, parts in found.items():
        if not OWN <= parts.keys() <= OWN | SHARED:
            continue
        for tree, down, up in pairs:
            places = _places(parts[D], len(parts[U]), down)
            if tree == _tree(name) and places:
                own = own_factors(down.float(), up.float(), parts[D].float(), parts[U].float(), places)
                layers[name] = Layer("bottleneck", dict(zip(("bottleneck_down", "bottleneck_up"), own, strict=True)))
    return layers


def shares(names: Mapping[str, Tensor]) -> bool:
    """Whether tensors, by keys of a file or peft's names, are of bottlenecks that share."""
    return any(name.endswith(f".{DOWN}") for name in names)


def multiplied(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The same with what is added times a number."""
    return {name: value * factor if name.rpartition(".")[2] in SCALED else value for name, value in tensors.items()}


def _tree(layer: str) -> str:
    """Of the network's layers "", of a text encoder's its name: what is shared is shared within."""
    return layer.partition(".")[0] if layer.startswith(TEXT_ENCODER) else ""


def _places(d: Tensor, width: int, down: Tensor) -> list[range]:
    """Which features have a bottleneck to themselves: all, or two parts (elsewhere d is zero). [] = of another pair."""
    (rank, size), features = down.shape, len(d)
    count = width // rank
    if width != count * rank or count * size > features or (count == 1 and size != features):
        return []
    first = 0
    if count > 1 and not d.is_meta:
        acting = d.flatten().nonzero().flatten().tolist() or [0]
        first = acting[0]
        if acting[-1] + 1 != first + count * size:
            return []
    return [range(first + i * size, first + (i + 1) * size) for i in range(count)]
