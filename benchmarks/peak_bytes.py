"""Peak memory of tensors, exactly and on every device: the same number in every run.

The operating system's figure for a process includes what the allocator keeps back and what other libraries hold;
this counts the bytes of the tensors that a piece of code makes, from their making to their end.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """``with PeakBytes() as memory:`` … ``memory.peak``: most bytes at once in storages made inside.

    What existed before counts nothing, neither do buffers inside of a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()  # keys of the storages that are counted, or that came from outside

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        # A tensor that came from outside is an argument before it can be (a view in) a result.
        for leaf in tree_leaves((args, kwargs)):
            self._see(leaf, counts=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._see(leaf, counts=True)
        self.peak = max(self.peak, self.live)
        return result

    def _see(self, value: object, *, counts: bool) -> None:
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            storage = value.untyped_storage()
        elif isinstance(value, torch.UntypedStorage):  # a tensor may be made over existing memory
            storage = value
        else:
            return
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
