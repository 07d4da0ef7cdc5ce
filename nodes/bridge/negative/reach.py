"""Whether the layers that are to act have acted: another node may have put something of its own in a layer's place.

Nodes that come later in the graph may do so without asking what was there before. ComfyUI tells neither of the two, and
the negative prompt would do nothing there, or would be read as a part of the positive one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
from torch import nn

NETWORK = "diffusion_model"


class LayerForward:
    """An object patch of ours, in the place of a layer's ``forward``."""


OURS = LayerForward()


@dataclass(frozen=True)
class Layer:
    """A place where a model meets its text."""

    key: Any  # of it, in :attr:`Call.answered`
    path: str  # of its module, in the network
    block: tuple[str, int] | None = None  # as ``patches_replace["dit"]`` calls where it is


def blocks(network: nn.Module, names: Sequence[str]) -> list[Layer]:
    """The blocks of a transformer, of its lists of double ones and then single ones."""
    found: list[Layer] = []
    for name, kind in zip(names, ("double_block", "single_block"), strict=False):
        paths = [f"{name}.{number}" for number in range(len(network.get_submodule(name)._modules))]
        found += [Layer(len(found) + number, path, (kind, number)) for number, path in enumerate(paths)]
    return found


def replaced(
    layers: Iterable[Layer], network: nn.Module, patcher: comfy.model_patcher.ModelPatcher | None, options: Mapping
) -> list[Layer]:
    """Those in whose place, or around which, other nodes have put something, which may ask for ours or not."""
    others = [] if patcher is None else [_place(*each) for each in patcher.object_patches.items()]
    given = options.get("patches_replace", {}).get("dit", {})
    return [
        layer
        for layer in layers
        if layer.block in given
        or any(other and _touch(other, layer.path) for other in others)
        or not isinstance(vars(network.get_submodule(layer.path)).get("forward", OURS), LayerForward)
    ]


def _place(path: str, patch: Any) -> str:
    """The module that an object patch is of, in the network; "" for ours, and for those of no part of it."""
    if isinstance(patch, LayerForward) or not path.startswith(f"{NETWORK}."):
        return ""
    return path.removeprefix(f"{NETWORK}.").removesuffix("forward").removesuffix(".")


def _touch(one: str, other: str) -> bool:
    """Whether one is the other or a part of it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def hidden(paths: Sequence[str]) -> ValueError:
    """The error for layers that another node answers for."""
    more = f" and {len(paths) - 1} more layers" if len(paths) > 1 else ""
    return ValueError(
        f"another node has replaced {paths[0]}{more} of this model and does not ask what was there before: the "
        "negative prompt would do nothing there. Put the negative prompt behind that node, or remove one of the two"
    )
