"""What a model was told of its prompts, on the device for as long as it is small."""

from collections import OrderedDict
from collections.abc import Collection, Hashable

import comfy.conds
from torch import Tensor

LARGEST = 2**28  # bytes


class KeptConds:
    """ComfyUI's conds by prompt, guidance and latent size. The ones that were used least lately go, and are made again
    from what the text encoder answered, which stays in CPU memory.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        self._largest = largest
        self._conds: OrderedDict[Hashable, dict[str, comfy.conds.CONDRegular]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._conds

    def __len__(self) -> int:
        return len(self._conds)

    def __getitem__(self, key: Hashable) -> dict[str, comfy.conds.CONDRegular]:
        self._conds.move_to_end(key)
        return self._conds[key]

    def __setitem__(self, key: Hashable, conds: dict[str, comfy.conds.CONDRegular]) -> None:
        self._conds[key] = conds

    def shrink(self, wanted: Collection[Hashable]) -> None:
        """Forgets until the rest is small enough, but for what is ``wanted`` now."""
        total = sum(map(_nbytes, self._conds.values()))
        for key in list(self._conds):
            if total <= self._largest:
                return
            if key not in wanted:
                total -= _nbytes(self._conds.pop(key))


def _nbytes(conds: dict[str, comfy.conds.CONDRegular]) -> int:
    held = [part for each in conds.values() for part in (each.cond if isinstance(each.cond, list) else [each.cond])]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
