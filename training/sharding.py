"""A network in parts, one on each of several processes, for one that is larger than a device: FSDP2.

A block's weights are put together before it is computed, forwards and backwards, and dropped afterwards. An adapter
stays whole on every process: it is small, and it is put on after this. Where all weights are trained, each process has
its part of them, of their gradients and of what an optimizer keeps.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .gradients import repeated_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import OffloadPolicy


def sharded(
    module: nn.Module, mesh: "DeviceMesh", *, reshard: bool = True, offload: "OffloadPolicy | None" = None
) -> nn.Module:
    """``module``, of whose weights this process keeps its part of ``mesh`` and moves it to its device.

    ``reshard``: drop a block's weights between its passes, too. ``offload`` may keep the part in main memory.
    """
    from torch.distributed.fsdp import OffloadPolicy, fully_shard

    policy = offload or OffloadPolicy()
    for block in repeated_blocks(module):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy)
    return module


class Twofold:
    """Places a network as one to train, in float32, and keeps a frozen copy of it that is placed alike."""

    def __init__(self, place: Callable[[nn.Module], nn.Module]) -> None:
        self._place = place
        self.frozen: nn.Module | None = None

    def __call__(self, module: nn.Module) -> nn.Module:
        self.frozen = self._place(copy.deepcopy(module).requires_grad_(False))
        for parameter in module.parameters():
            parameter.data = parameter.data.float()
        return self._place(module.requires_grad_(True))


def is_part(tensor: Any) -> bool:
    """Whether it is a tensor of which other processes have the rest."""
    if type(tensor) in (Tensor, nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def whole(weight: Any) -> Tensor:
    """All of a weight, a part of which may be here: then all processes have to ask."""
    return weight.full_tensor() if is_part(weight) else weight


@torch.no_grad()
def take_over(tensor: Any, value: Any) -> None:
    """Gives ``tensor`` the numbers of ``value``, which may be whole where the tensor is a part."""
    if is_part(tensor) and not is_part(value):
        tensor.to_local().copy_(own_rows(value, tensor.device_mesh))
    else:
        tensor.copy_(value)


def part_like(like: Any, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor of this size, in parts on the devices where those of ``like`` are."""
    from torch.distributed.tensor import DTensor

    shape = torch.empty(size, device="meta")
    own = torch.empty(own_rows(shape, like.device_mesh).shape, dtype=dtype, device=like.to_local().device)
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=shape.shape, stride=shape.stride()
    )


def own_rows(value: Tensor, mesh: "DeviceMesh") -> Tensor:
    """This process's part of a whole tensor, as FSDP2 deals rows out: maybe none."""
    rows, place = value.chunk(mesh.size()), mesh.get_local_rank()
    return rows[place] if place < len(rows) else value[:0]


@contextmanager
@torch.no_grad()
def put_together(layer: nn.Module) -> Iterator[None]:
    """Inside, a layer's own weights are whole; what they were changed to is afterwards in their parts."""
    parts = {name: weight for name, weight in layer.named_parameters(recurse=False) if is_part(weight)}
    for name, weight in parts.items():
        layer.register_parameter(name, nn.Parameter(whole(weight), weight.requires_grad))
    try:
        yield
    finally:
        for name, weight in parts.items():
            take_over(weight, layer.get_parameter(name))
            layer.register_parameter(name, weight)
