"""What a piece of code costs, counted from its tensors and products: the same figures on every device, in every run.

The operating system's figure for a process includes what the allocator keeps back and what other libraries hold;
this counts the bytes of the tensors that are made, from their making to their end.
"""

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

GIB = 2**30
# What allocators say when there is nothing left, of torch's CPU allocator on Linux and Windows, and of others.
_EXHAUSTED = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


@dataclass(frozen=True)
class Lap:
    """A piece of a measured run."""

    live: int  # bytes at its end
    trace: tuple[int, ...]  # bytes at its beginning, and after each operation
    flops: int  # of matrix products and convolutions

    @property
    def peak(self) -> int:
        """Most bytes at once during it."""
        return max(self.trace)


class Footprint(TorchDispatchMode):
    """``with Footprint() as cost:`` … ``cost.peak``: most bytes at once in storages made inside; ``cost.flops``.

    What existed before counts nothing, neither do buffers inside of a kernel. With a ``device``, only its memory
    counts.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._trace = [0]
        self._lap_flops = 0
        self._device = device
        # The storages that are counted, or that came from outside, by their keys; each is told of its end.
        self._known: dict[int, weakref.ref] = {}

    def lap(self) -> Lap:
        """What was since the last lap."""
        lap = Lap(self.live, tuple(self._trace), self.flops - self._lap_flops)
        self._trace, self._lap_flops = [self.live], self.flops
        return lap

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        # A tensor that came from outside is an argument before it can be (a view in) a result.
        self._see(args, counts=False)
        self._see(kwargs, counts=False)
        # As without this mode: classes such as ComfyUI-GGUF's see functions of torch, not the operations below them.
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        self._see(result, counts=True)
        self.peak = max(self.peak, self.live)
        self._trace.append(self.live)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _see(self, value: object, *, counts: bool) -> None:
        """Tensors, and lists and dicts of them: all that an operation is given. Called for each, so it is short."""
        if isinstance(value, Tensor):
            if not value.is_meta:
                self._know(value.untyped_storage(), counts)
        elif isinstance(value, tuple | list):
            for each in value:
                self._see(each, counts=counts)
        elif isinstance(value, dict):
            for each in value.values():
                self._see(each, counts=counts)
        elif isinstance(value, torch.UntypedStorage):  # a tensor may be made over existing memory
            self._know(value, counts)

    def _know(self, storage: torch.UntypedStorage, counts: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts and self._device in (None, storage.device) else 0
        self._known[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.live += size

    def _forget(self, key: int, size: int, reference: weakref.ref) -> None:
        del self._known[key]
        self.live -= size


def nbytes(tensors: Any) -> int:
    """Bytes of tensors, each memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _EXHAUSTED)


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None, **more: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None, **more: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


_FORMULAS: dict[Any, Any] = {  # torch counts attention's kernels for GPUs only
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
