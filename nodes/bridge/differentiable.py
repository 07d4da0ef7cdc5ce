"""Weights that autograd refuses, exchanged one by one.

Nodes run inside ``torch.inference_mode``, so what a loader node made are inference tensors: "Inference tensors
cannot be saved for backward". The storage under such a tensor knows nothing of that mode, so a new tensor over
the same memory is an ordinary one: no copy, not even of one weight. A quantised weight is such a tensor in each of its
parts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def exchange_inference_tensors(module: nn.Module) -> int:
    """Replaces the inference tensors in a module tree by ordinary ones of the same memory; returns how many.

    Parameters, buffers and tensors kept as plain attributes (caches, the resident weights of dynamic VRAM). The
    ordinary tensors stay: ComfyUI treats them alike, and the next run finds nothing to do. To be called outside
    inference mode.
    """
    exchanged = 0
    for part in module.modules():
        tables: list[Any] = [part._parameters, part._buffers, vars(part)]
        for tensors in tables:
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor.is_inference():
                    tensors[name] = ordinary(tensor)
                    exchanged += 1
    return exchanged


def ordinary(tensor: Tensor) -> Tensor:
    """The same values as an ordinary tensor of the same memory."""
    alias = _of_parts(tensor) if is_traceable_wrapper_subclass(tensor) else _of_storage(tensor)
    notes = {name: note for name, note in vars(tensor).items() if name not in vars(alias)}  # ComfyUI's, on weights
    vars(alias).update(notes)
    return alias


def _of_storage(tensor: Tensor) -> Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if type(tensor) in (Tensor, nn.Parameter):
        return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
    return alias.as_subclass(type(tensor))  # packed bytes with notes on them, as in GGUF


def _of_parts(tensor: Any) -> Tensor:
    """A wrapper around several tensors, as ComfyUI's quantised weights are: parts, and a recipe to put them together.

    What makes a parameter of such a tensor is a note on it, and copied with the others: nn.Parameter copies parts.
    """
    names, recipe = tensor.__tensor_flatten__()
    parts = {name: ordinary(getattr(tensor, name)) for name in names}
    alias = type(tensor).__tensor_unflatten__(parts, recipe, tensor.size(), tensor.stride())
    vars(alias).update(parts)
    return alias
