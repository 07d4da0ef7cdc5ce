"""A frozen network in parts, one on each of several processes, for one that is larger than a device: FSDP2.

A block's weights are put together before it is computed, forwards and backwards, and dropped afterwards. What is
trained stays whole on every process: an adapter is small, and it is put on after this.
"""

from typing import TYPE_CHECKING

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


@torch.no_grad()
def whole(weight: Tensor) -> Tensor:
    """All of a weight, a part of which may be here: then all processes have to ask."""
    if type(weight) in (Tensor, nn.Parameter) or not dist.is_available():
        return weight
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight
