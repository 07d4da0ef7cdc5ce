"""How the routers of StyleInject divide what passes through a model, while it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 0.99  # of what was counted, from one optimizer step to the next: the last hundred steps count


@dataclass(frozen=True)
class Routing:
    """How one router has divided its inputs."""

    shares: tuple[float, ...]  # mean of s, of each branch; they sum to 1
    entropy: float  # mean entropy of s over that of an even division: 1 = even, 0 = one branch for each input
    spread: float  # what the input decides: entropy of the mean less mean entropy, by the same measure; 0 = nothing


class RoutingMeter:
    """Counts by layer, on the device: nothing waits for it until it is read.

    What is counted belongs to no step until :meth:`complete`, so that a run that is interrupted goes on exactly.
    """

    def __init__(self, layers: Sequence[str], branches: int) -> None:
        self.layers = tuple(layers)
        self._table = torch.zeros(len(layers), branches + 2)  # sums of shares and of entropies, and how many
        self._pending = torch.zeros_like(self._table)

    def add(self, layer: int, shares: Tensor) -> None:
        """Routings s (b, n) of the layer of this number."""
        if self._pending.device != shares.device:
            self._table, self._pending = self._table.to(shares.device), self._pending.to(shares.device)
        shares = shares.detach().float()
        counted = torch.cat([shares, _entropy(shares)[:, None], torch.ones_like(shares[:, :1])], 1)
        self._pending[layer] += counted.sum(0)

    def complete(self) -> None:
        """A step is done."""
        self._table.mul_(KEPT).add_(self._pending)
        self._pending.zero_()

    def read(self) -> dict[str, Routing]:
        """Of the layers that have seen anything in complete steps."""
        table = self._table.double().cpu()
        return {name: _routing(row) for name, row in zip(self.layers, table, strict=True) if row[-1] > 0}

    def state_dict(self) -> Tensor:
        return self._table.cpu()

    def load_state_dict(self, table: Tensor) -> None:
        self._table = table.to(self._table)
        self._pending.zero_()


def _routing(row: Tensor) -> Routing:
    sums, number = row[:-1], row[-1]
    mean, entropy = sums[:-1] / number, sums[-1] / number
    even = _entropy(torch.full_like(mean, 1 / len(mean))).clamp(min=1e-12)  # 0 of a single branch
    return Routing(tuple(mean.tolist()), float(entropy / even), max(0.0, float((_entropy(mean) - entropy) / even)))


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(-1)
