"""Which examples come when: an endless order of batches, each a pure function of the seed and its place.

Examples that fit into one batch form a group. Groups take turns so that all examples of a pool are seen at the same
rate, and pools take turns by their shares: pictures of the style, and those for prior preservation.
"""

import heapq
import math
from collections.abc import Sequence

import torch

from ..randomness import generator


class Order:
    """An order over numbers of examples."""

    def __init__(self, pools: Sequence[Sequence[Sequence[int]]], seats: Sequence[int]) -> None:
        """``pools`` hold groups of example numbers, each as often as it is repeated; ``seats`` are the pools' turns."""
        firsts = [sum(len(pool) for pool in pools[:place]) for place in range(len(pools))]
        self._pools = [_Pool(pool, first) for pool, first in zip(pools, firsts, strict=True)]
        self._cycle = turns(seats)

    def batch(self, seed: int, index: int, size: int) -> list[int]:
        """The examples of the batch ``index`` of a run: from one group."""
        pool, turn = _turn(self._cycle, index)
        return self._pools[pool].batch(seed, turn, size)


class _Pool:
    """Groups, each a stream of shuffled epochs that is cut into batches, which run on from one epoch into the next."""

    def __init__(self, groups: Sequence[Sequence[int]], first: int) -> None:
        self._groups = groups
        self._first = first  # number of its first group among those of all pools
        self._cycle = turns([len(group) for group in groups])

    def batch(self, seed: int, index: int, size: int) -> list[int]:
        group, turn = _turn(self._cycle, index)
        return self._draw(seed, group, turn * size, size)

    def _draw(self, seed: int, group: int, start: int, count: int) -> list[int]:
        """Examples ``start`` to ``start + count`` of a group's stream."""
        members, name = self._groups[group], self._first + group
        epochs = range(start // len(members), (start + count - 1) // len(members) + 1)
        orders = [torch.randperm(len(members), generator=generator(seed, "epoch", name, k)).tolist() for k in epochs]
        stream = [members[place] for order in orders for place in order]
        first = start % len(members)
        return stream[first : first + count]


def _turn(cycle: list[int], index: int) -> tuple[int, int]:
    """Whose turn ``index`` is, and how many turns it had before."""
    cycles, place = divmod(index, len(cycle))
    whose = cycle[place]
    return whose, cycles * cycle.count(whose) + cycle[:place].count(whose)


def turns(sizes: Sequence[int]) -> list[int]:
    """A cycle of group numbers in which each group occurs in proportion to its size, spread evenly.

    Webster's method of apportionment: the next seat goes to the group with the most members for a half more than
    the seats it has. One cycle is the shortest that is exactly proportional.
    """
    queue = [(1 / size, 0, group) for group, size in enumerate(sizes)]
    heapq.heapify(queue)
    cycle = []
    for _ in range(sum(sizes) // math.gcd(*sizes)):
        _, seats, group = queue[0]
        cycle.append(group)
        heapq.heapreplace(queue, ((2 * seats + 3) / sizes[group], seats + 1, group))
    return cycle
