"""What one of several processes does of an optimizer step, so that all of them together do what one alone would do.

The options of a run say what a step is: ``accumulation`` batches of ``batch_size`` samples. Whole batches are dealt
out as far as their number goes round, and cut into equal parts beyond that: four processes share a step of two
batches of six as a half of a batch, three samples, each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..processes import Processes
from .differing import OF_INPUTS
from .tables import differences


class Steps(Protocol):
    """Options that say what an optimizer step is."""

    @property
    def batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...


@dataclass(frozen=True)
class Share:
    """One process's part of every step."""

    passes: range  # which of the step's batches
    rows: slice  # of each of them
    parts: int  # that each batch is cut into: the sum over processes of mean gradients is so many times too large
    part: tuple[int, ...]  # which of them this is, as a place for draws; () of a batch that is whole

    @property
    def batch_size(self) -> int:
        """Samples at once."""
        return self.rows.stop - self.rows.start

    @property
    def of_step(self) -> list[slice]:
        """For each pass, which of all the step's samples these are."""
        whole = self.batch_size * self.parts
        return [slice(micro * whole + self.rows.start, micro * whole + self.rows.stop) for micro in self.passes]


def share_of(steps: Steps, processes: Processes) -> Share:
    """ValueError for a step whose samples cannot be dealt out evenly."""
    batch_size, accumulation, count = steps.batch_size, steps.accumulation, processes.count
    if batch_size * accumulation % count:
        raise ValueError(
            f"Got batch_size={batch_size} and accumulation={accumulation} for {count} processes: a step's "
            f"{batch_size * accumulation} samples are dealt out to them, so that their number is a multiple of {count}."
        )
    hands = math.gcd(accumulation, count)  # groups of processes that get batches of their own
    parts, each = count // hands, accumulation // hands
    hand, part = divmod(processes.rank, parts)
    rows = batch_size // parts
    return Share(
        range(hand * each, (hand + 1) * each),
        slice(part * rows, (part + 1) * rows),
        parts,
        (part,) if parts > 1 else (),
    )


def require_alike(table: Mapping[str, Any], processes: Processes) -> None:
    """ValueError, in all processes, where one of them has another ``table`` of options than the first."""
    first, *others = processes.gathered(table)
    with processes.together():
        for rank, other in enumerate(others, start=1):
            if differing := differences(first, other):
                listed = "; ".join(
                    OF_INPUTS.get(name, f"{name} is {a!r} in the first and {b!r} here")
                    for name, (a, b) in differing.items()
                )
                raise ValueError(
                    f"Process {rank} of {processes.count} was begun with something else than the first: {listed}. "
                    "Begin all of them with the same command, pictures and model."
                )
