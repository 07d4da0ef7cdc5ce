"""Passes that are measured: one batch of nothing in particular through the model, the adapter in its place."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..adapters.attach import Adapter
from ..denoiser import Conditioning, Denoiser
from ..gradients import repeated_blocks
from ..memory import Footprint, Lap
from ..randomness import generator
from .config import TrainConfig
from .course import Call, Course
from .passes import Noised, learn_from
from .saving import Saving

NOTHING = Lap(0, (0,), 0)


@dataclass(frozen=True)
class Bench:
    """What every probe of a run has in common."""

    denoiser: Denoiser
    adapter: Adapter
    config: TrainConfig
    conditioning: Conditioning  # (1, …)
    channels: int
    masked: bool
    device: torch.device


def measured(bench: Bench, shape: tuple[int, int, int], saving: Saving) -> Course:
    """The course of a batch of the latent shape (b, h, w). The adapter's gradients are afterwards as they were."""
    module, cost = bench.denoiser.module, Footprint(bench.device)
    log = _Log(cost)
    with gradients_put_back(bench), saving.applied(module, bench.device), _watched(module, log), cost:
        run(bench, shape)
        log.close()
    return log.course(cost.flops)


def run(bench: Bench, shape: tuple[int, int, int]) -> None:
    """Forward and backward pass of a batch of noise. Draws from no global generator."""
    learn_from(_noised(bench, shape), bench.denoiser, bench.adapter, bench.config, generator(0, "probe"))


def _noised(bench: Bench, shape: tuple[int, int, int]) -> Noised:
    size = (shape[0], bench.channels, *shape[1:])
    drawn = torch.randn(size, generator=generator(0, "probe"))
    low, high = bench.denoiser.log_snr_range
    return Noised(
        x0=drawn.to(bench.device),
        log_snr=torch.full(shape[:1], min(max(-1.0, low), high), device=bench.device),
        eps=drawn.flip(0).to(bench.device, copy=True),
        mask=torch.ones(shape[0], 1, *shape[1:], device=bench.device) if bench.masked else None,
        conditioning={
            name: row.expand(shape[0], *row.shape[1:]).to(bench.device) for name, row in bench.conditioning.items()
        },
    )


@contextmanager
def gradients_put_back(bench: Bench) -> Iterator[None]:
    """Inside, there are gradients from batches before, where a step has several."""
    parameters = bench.adapter.parameters()
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if bench.config.accumulation > 1 else None
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


@dataclass
class _Call:
    """One call of a block, as it was seen."""

    place: int
    parked: int
    before: int  # bytes
    forward: Lap = NOTHING
    backward: Lap | None = None  # None = nothing was differentiated


@dataclass
class _Log:
    """Cuts a pass into laps at the blocks' borders."""

    cost: Footprint
    calls: list[_Call] = field(default_factory=list)
    loss: Lap | None = None  # from the last block to the loss and back
    _inside: Callable[[Lap], None] | None = None  # who gets the lap that is under way

    def enter(self, place: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
        self.calls.append(_Call(place, sum(value.nbytes for value in values), self.cost.live))

    def leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        call = self.calls[-1]
        call.forward = self.cost.lap()
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                value.grad_fn.register_prehook(partial(self._begins, call))

    def _begins(self, call: _Call, gradients: Any) -> None:
        """The backward pass has come to a block: to the first of its outputs."""
        if call.backward is not None:
            return
        self.close()
        call.backward = NOTHING
        self._inside = partial(setattr, call, "backward")

    def close(self) -> None:
        lap = self.cost.lap()
        if self._inside is None:
            self.loss = lap
        else:
            self._inside(lap)

    def course(self, flops: int) -> Course:
        calls, starts = [], [call.before for call in self.calls]
        levels = [*starts[1:], self.calls[-1].forward.live] if self.calls else [0]
        for call, level in zip(self.calls, levels, strict=False):
            numbers = _numbers(level - call.before, call.parked, call.forward.flops)
            forward = _numbers(*call.forward.trace) - call.before
            backward = _numbers(*call.backward.trace) - level if call.backward else _numbers(0)
            calls.append(Call(call.place, numbers, forward, backward))
        loss = _numbers(*self.loss.trace) - levels[-1] if self.loss else _numbers(0)
        return Course(tuple(calls), _numbers(starts[0] if starts else 0, flops), loss)


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@contextmanager
def _watched(module: nn.Module, log: _Log) -> Iterator[None]:
    with ExitStack() as stack:
        for place, block in enumerate(repeated_blocks(module)):
            stack.callback(block.register_forward_pre_hook(partial(log.enter, place), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(log.leave).remove)
        yield
