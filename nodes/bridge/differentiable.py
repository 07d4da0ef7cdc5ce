"""Weights that autograd refuses, exchanged one by one.

Nodes run inside ``torch.inference_mode``, so what a loader node made are inference tensors: "Inference tensors
cannot be saved for backward". The storage under such a tensor knows nothing of that mode, so a new tensor over
the same memory is an ordinary one: no copy, not even of one weight.

Quantised weights stay as they are: they are no memory but objects around several tensors, and what is moved in
inference mode later must have been made in it. Nothing saves them, see :mod:`...training.frozen`.
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
                if isinstance(tensor, Tensor) and tensor.is_inference() and not is_traceable_wrapper_subclass(tensor):
                    tensors[name] = ordinary(tensor)
                    exchanged += 1
    return exchanged


def ordinary(tensor: Tensor) -> Tensor:
    """The same values as an ordinary tensor of the same memory."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if type(tensor) not in (Tensor, nn.Parameter):  # packed bytes with notes on them, as in GGUF
        alias = alias.as_subclass(type(tensor))
    if isinstance(tensor, nn.Parameter):
        alias = nn.Parameter(alias, requires_grad=False)
    vars(alias).update(vars(tensor))  # ComfyUI notes dtypes on its weights
    return alias
