"""Losses between two reports. They stay on the device and are moved once, so that no step waits for another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteLoss


@dataclass(frozen=True)
class Measured:
    """One batch: losses (b,) on the device, log_snr (b,) on the CPU where it was drawn."""

    step: int
    captions: tuple[str, ...]
    log_snr: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Reading:
    """What was measured since the last reading, on the CPU."""

    log_snr: Tensor  # (n,)
    losses: Tensor  # (n,)
    by_step: list[float]  # mean loss of each optimizer step
    others: Mapping[str, float]  # means of what else was noted


class Meter:
    def __init__(self) -> None:
        self._batches: list[Measured] = []
        self._norms: dict[int, Tensor] = {}  # of the gradient, by step
        self._others: dict[str, list[Tensor]] = {}  # by name

    def add(self, step: int, captions: tuple[str, ...], log_snr: Tensor, losses: Tensor) -> None:
        """Keeps the losses (b,) of a batch, detached."""
        self._batches.append(Measured(step, tuple(captions), log_snr, losses.detach()))

    def add_norm(self, step: int, norm: Tensor) -> None:
        """Keeps the norm () of the gradient of a step."""
        self._norms[step] = norm.detach()

    def note(self, name: str, value: Tensor) -> None:
        """Keeps a further number (), whose mean is told."""
        self._others.setdefault(name, []).append(value.detach())

    def check(self, step: int) -> None:
        """NonFiniteLoss if a loss or the gradient of ``step`` is NaN or infinite. Waits for the device."""
        _check([batch for batch in self._batches if batch.step == step], {step: self._norms[step]})

    def read(self, done: int) -> Reading | None:
        """Moves and forgets the ``done`` complete steps' losses; None where there are none.

        NonFiniteLoss as in :meth:`check`, and again at every later call: what followed such a step is worthless.
        """
        batches = [batch for batch in self._batches if batch.step < done]
        if not batches:
            return None
        batches = _check(batches, {step: norm for step, norm in self._norms.items() if step < done})
        self._batches.clear()
        self._norms.clear()
        others = {name: torch.stack(values).float().mean().item() for name, values in self._others.items()}
        self._others.clear()
        losses = torch.cat([batch.losses for batch in batches])
        steps = sorted({batch.step for batch in batches})
        by_step = [torch.cat([b.losses for b in batches if b.step == step]).mean().item() for step in steps]
        return Reading(torch.cat([batch.log_snr for batch in batches]), losses, by_step, others)


def joined(readings: Sequence[Reading]) -> Reading:
    """The readings of processes that had equal shares of the same steps."""
    if len(readings) == 1:
        return readings[0]
    by_step = torch.tensor([reading.by_step for reading in readings], dtype=torch.float64).mean(0).tolist()
    names = {name: [r.others[name] for r in readings if name in r.others] for r in readings for name in r.others}
    return Reading(
        torch.cat([reading.log_snr for reading in readings]),
        torch.cat([reading.losses for reading in readings]),
        by_step,
        {name: sum(values) / len(values) for name, values in names.items()},
    )


def _check(batches: list[Measured], norms: dict[int, Tensor]) -> list[Measured]:
    """The same batches with their losses on the CPU, moved in one transfer."""
    moved = torch.cat([batch.losses for batch in batches] + [torch.stack(list(norms.values()))]).cpu()
    *losses, gradients = moved.split([len(batch.losses) for batch in batches] + [len(norms)])
    for batch, values in zip(batches, losses, strict=True):
        if not bool(values.isfinite().all()):
            raise NonFiniteLoss(_describe(batch, f"The loss is {values.tolist()}"))
    for step, norm in zip(norms, gradients.tolist(), strict=True):
        if not torch.tensor(norm).isfinite():
            batch = next(batch for batch in batches if batch.step == step)
            raise NonFiniteLoss(_describe(batch, f"The norm of the gradient is {norm}"))
    return [Measured(b.step, b.captions, b.log_snr, v) for b, v in zip(batches, losses, strict=True)]


def _describe(batch: Measured, what: str) -> str:
    levels = ", ".join(f"{level:.3f}" for level in batch.log_snr.tolist())
    return (
        f"{what} in step {batch.step + 1}, for the captions {list(batch.captions)} at log_snr [{levels}]. Nothing of "
        "this step was saved, and what was learned before it is kept. A lower learning rate, a clip_norm of 1, or "
        "float32 where the precision is another, may help."
    )
