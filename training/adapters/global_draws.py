"""torch's global generators, for what draws from nothing else, such as its dropout and peft's layers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def global_draws(near: Iterable[Tensor], source: torch.Generator) -> Iterator[None]:
    """Inside, torch's global generators of the CPU and of these tensors' devices continue from ``source``."""
    devices = cuda_devices(near)
    seed = int(torch.randint(2**62, (), generator=source))
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def cuda_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices among those of these tensors that have a global generator of their own, each once."""
    return sorted({tensor.device for tensor in tensors if tensor.device.type == "cuda"}, key=str)
