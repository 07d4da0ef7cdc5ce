"""The course of one batch through a network, block by block: measured at small sizes, foretold at any.

What a block keeps and makes is a polynomial of the tokens n in each of the batch's pictures: a constant (modulation,
text), n (activations) and n² (scores of attention, where a kernel keeps them). So a few small passes tell it for the
size that will be trained, operation by operation, and the level of memory at any place and for any choice of blocks
to recompute is a sum.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..offload import LEAST_BYTES


@dataclass(frozen=True)
class Call:
    """One call of a block. Everything float64."""

    place: int  # of the block among ``repeated_blocks``
    numbers: Tensor  # (3,): see the properties
    forward: Tensor  # (operations,) bytes over the level before it, while it runs
    backward: Tensor  # (operations,) bytes over the level after it, while it is differentiated

    @property
    def rise(self) -> float:
        """Bytes that it leaves behind."""
        return float(self.numbers[0])

    @property
    def parked(self) -> float:
        """Bytes of its inputs that could wait in CPU memory."""
        return float(self.numbers[1])

    @property
    def flops(self) -> float:
        """Of its forward pass: what recomputing it costs."""
        return float(self.numbers[2])


@dataclass(frozen=True)
class Course:
    """Bytes and products of one batch."""

    calls: tuple[Call, ...]  # in the order of the forward pass
    numbers: Tensor  # (2,) bytes before the first block; FLOPs of both passes
    loss: Tensor  # (operations,) bytes over the last level, from the last block to the loss and back

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(call.place for call in self.calls)

    @property
    def start(self) -> float:
        return float(self.numbers[0])

    @property
    def flops(self) -> float:
        return float(self.numbers[1])


@dataclass(frozen=True)
class Point:
    """A size, and what was measured there."""

    batch: int
    tokens: float  # of a picture, in any unit
    course: Course


def foretold(points: Sequence[Point], batch: int, tokens: float) -> Course:
    """The course at a size, from measured ones of the same network. A point of that very size is the answer."""
    for point in points:
        if (point.batch, point.tokens) == (batch, tokens):
            return point.course
    first = points[0].course
    if any(point.course.places != first.places for point in points):
        raise ValueError("the network runs other blocks at other sizes, so that nothing can be foretold")
    known = _known(points)
    rows = torch.stack([_terms(point.batch, point.tokens / tokens)[known] for point in points])
    weights = _terms(batch, 1.0)[known] @ torch.linalg.pinv(rows)  # of the points, in the answer

    def told(values: list[Tensor]) -> Tensor:
        if len({len(value) for value in values}) > 1:  # other operations at other sizes: only their peaks compare
            values = [value.max()[None] for value in values]
        return weights @ torch.stack(values)

    courses = [point.course for point in points]
    return Course(
        tuple(
            Call(
                calls[0].place,
                told([call.numbers for call in calls]),
                told([call.forward for call in calls]),
                told([call.backward for call in calls]),
            )
            for calls in zip(*(course.calls for course in courses), strict=True)
        ),
        told([course.numbers for course in courses]),
        told([course.loss for course in courses]),
    )


def _terms(batch: int, tokens: float) -> Tensor:
    return torch.tensor([batch * tokens, batch, batch * tokens**2], dtype=torch.float64)


def _known(points: Sequence[Point]) -> slice:
    """Which terms so many points can tell apart."""
    return slice(len({point.tokens for point in points}))


def peak(kept: Course, recomputed: Course, chosen: Collection[int], *, offload: bool = False) -> float:
    """The most bytes at once in a batch whose blocks at the places ``chosen`` are recomputed, the others kept."""
    level = most = recomputed.start
    ahead, last = 0.0, recomputed
    for stored, again in zip(kept.calls, recomputed.calls, strict=True):
        call = again if again.place in chosen else stored
        last = recomputed if call is again else kept
        parked = call.parked if offload and call is again and call.parked >= LEAST_BYTES else 0.0
        most = max(most, level + float(call.forward.max()))
        level += call.rise - parked
        # On the way back its input is there again, and that of the block before comes early.
        most = max(most, level + parked + (ahead if parked else 0.0) + float(call.backward.max()))
        ahead = parked
    return max(most, level + float(last.loss.max()))


def order_of_recomputing(kept: Course, recomputed: Course) -> list[int]:
    """Places of blocks, first the one that frees most memory for its arithmetic; among equals the earliest.

    Early blocks are recomputed last, when everything kept of the later ones is free again.
    """
    freed: dict[int, float] = {}
    cost: dict[int, float] = {}
    for stored, again in zip(kept.calls, recomputed.calls, strict=True):
        freed[stored.place] = freed.get(stored.place, 0.0) + stored.rise - again.rise
        cost[stored.place] = cost.get(stored.place, 0.0) + stored.flops
    worth = {place: freed[place] / max(cost[place], 1.0) for place in freed}
    best = max(worth.values(), default=1.0) or 1.0
    return sorted(worth, key=lambda place: (-round(worth[place] / best, 2), place))
