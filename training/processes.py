"""Several processes that train one adapter: which one this is, and the few things that they tell each other.

Each has the model and the adapter, and computes its share of a step. Only an adapter's gradients need to be added up,
a few hundred megabytes at most: one sum over all of them, and no wrapper around the model. Of a model in parts all of
whose weights learn (sharding.py), the parts of the gradients are added up as they are computed.

Words (objects, errors, who is done) go over gloo, which keeps no device waiting. A process that dies closes its
connections, which the others notice at their next word.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .errors import IncompatibleCheckpoint, LostProcess, NonFiniteLoss, TrainingError
from .sharding import is_part

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)  # for a process that is busy, for example with encoding pictures
# What an error becomes in the other processes: the first kind that it is.
KINDS = (
    KeyboardInterrupt,
    NonFiniteLoss,
    IncompatibleCheckpoint,
    TrainingError,
    ValueError,
    OSError,
    MemoryError,
    RuntimeError,
)


class Processes:
    """The processes of a run. All of them call the methods in the same order; with one alone they do nothing."""

    def __init__(self, words: "dist.ProcessGroup | None" = None, *, sharded: bool = False) -> None:
        """``words``: a gloo group of all; None = this process alone. ``sharded``: each has a part of the model."""
        self._words = words
        self.rank = 0 if words is None else words.rank()
        self.count = 1 if words is None else words.size()
        self.sharded = sharded
        self._raised: BaseException | None = None

    @property
    def words(self) -> "dist.ProcessGroup | None":
        """The group in which they talk; None = this process alone."""
        return self._words

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def shared(self, value: T) -> T:
        """The first process's ``value`` in all of them."""
        if self._words is None:
            return value
        values = [value]
        with _reaching():
            dist.broadcast_object_list(values, src=0, group=self._words)
        return values[0]

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the first process, in all of them. They raise what it raises."""
        value: Any = None
        with self.together():
            if self.writes:
                value = make()
        return self.shared(value)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """One process after the other. What one raises inside, all raise, after the last."""
        error = None
        for turn in range(self.count):
            if turn == self.rank:
                try:
                    yield
                except BaseException as raised:
                    error = raised
            self.gathered(None)
        with self.together():
            if error is not None:
                raise error

    def gathered(self, value: T) -> list[T]:
        """The value of each process, in their order."""
        if self._words is None:
            return [value]
        values: list[T] = [value] * self.count
        with _reaching():
            dist.all_gather_object(values, value, group=self._words)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises inside, all raise, so that none waits for one that has left.

        Nothing that waits for the others belongs inside.
        """
        if self._words is None:
            yield
            return
        error = None
        try:
            yield
        except BaseException as raised:
            error = raised
        if error is None or not (self.all_raise(error) or isinstance(error, LostProcess)):
            error = self._first_of(error)
        if error is not None:
            raise error

    def passing(self) -> AbstractContextManager[None]:
        """:meth:`together`, for passes through the model. Of a sharded one they wait for the others themselves."""
        return nullcontext() if self.sharded else self.together()

    def all_raise(self, error: BaseException) -> bool:
        """Whether all processes raise this error, and could still do something together."""
        return self._words is None or error is self._raised

    def _first_of(self, error: BaseException | None) -> BaseException | None:
        """This process's error, or the first one's where there is one; None where nobody has any."""
        failed = torch.tensor([error is not None], dtype=torch.int32)
        with _reaching():
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._words)
        if not failed.item():
            return None
        # Of several errors one: a loss that is not finite, for example, before the norm of the gradient in the others.
        told = min(each for each in self.gathered(None if error is None else _told(error)) if each is not None)
        self._raised = error if error is not None and _told(error) == told else _understood(*told)
        return self._raised

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter], divisor: int = 1) -> None:
        """Has each gradient be the sum over all processes, divided by ``divisor``. The same bits in all of them."""
        if any(map(is_part, parameters)):  # FSDP2 gave the mean over the processes
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad *= self.count / divisor
            return
        if self._words is None:
            for parameter in parameters if divisor > 1 else ():
                if parameter.grad is not None:
                    parameter.grad /= divisor
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with _reaching():
            dist.all_reduce(flat, group=self._words if flat.device.type == "cpu" else None)
        flat /= divisor
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = total.view_as(parameter)


ALONE = Processes()


def group_of_words() -> "dist.ProcessGroup":
    """For :class:`Processes`, among those that torch.distributed was begun with. All of them call it."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


@contextmanager
def _reaching() -> Iterator[None]:
    """LostProcess where another process cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            "another process of this run has ended, or cannot be reached. What was learned until the last complete "
            "step is kept, or until the last checkpoint if it was the first process, or if it had a part of what is "
            "trained: run it again to continue"
        ) from error


def _told(error: BaseException) -> tuple[int, str]:
    """An error as a kind and a text, which every process understands."""
    for place, kind in enumerate(KINDS):
        if isinstance(error, kind):
            return place, str(error)
    return KINDS.index(TrainingError), f"{type(error).__name__}: {error}"


def _understood(place: int, text: str) -> BaseException:
    return KINDS[place](text)
