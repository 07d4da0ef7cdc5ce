"""What a run says while it runs: one event a report, and the log that keeps them, one JSON line each."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from ..formats.state import write_atomically

BIN_WIDTH = 2.0  # of log_snr


@dataclass(frozen=True)
class LossBin:
    """The mean loss of the samples with low <= log_snr < high."""

    low: float
    high: float
    loss: float
    samples: int


@dataclass(frozen=True)
class Event:
    """A report. Losses are means since the report before, of what is minimised: weighted where a weighting is on."""

    step: int  # optimizer steps done
    steps: int  # that the run will have
    samples: int  # noised examples seen
    loss: float
    loss_by_bin: tuple[LossBin, ...]
    learning_rate: float
    seconds: float  # of training, over all sessions of the run
    peak_bytes: int | None  # memory: of the device on CUDA, of the process elsewhere; None = not known
    routing: Mapping[str, Any] = field(default_factory=dict)  # of styleinject, over the layers (formats/routing)
    others: Mapping[str, float] = field(default_factory=dict)  # means of what else a loop measures, by name
    images: Tensor | None = None  # samples (b, 3, h, w) in [0, 1]; not in the log


def bins_of(log_snr: Tensor, losses: Tensor) -> tuple[LossBin, ...]:
    """Mean losses (n,) in bins of ``BIN_WIDTH`` of log_snr (n,), noisiest first, empty ones left out."""
    index = torch.floor(log_snr / BIN_WIDTH)
    return tuple(
        LossBin(
            low=low * BIN_WIDTH,
            high=(low + 1) * BIN_WIDTH,
            loss=losses[index == low].mean().item(),
            samples=int((index == low).sum()),
        )
        for low in index.unique().tolist()
    )


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that torch held on a CUDA device, elsewhere the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def to_line(event: Event) -> str:
    """One line of JSON. A number that JSON lacks becomes null."""
    values = asdict(replace(event, images=None))
    del values["images"]
    return json.dumps(_finite(values), ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_line(line: str) -> Event:
    """The inverse of :func:`to_line`. ValueError for a line that is none."""
    values: dict[str, Any] = json.loads(line)
    try:
        values["loss_by_bin"] = tuple(LossBin(**entry) for entry in values["loss_by_bin"])
        return Event(**values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"Not an event of a training run: {line[:80]!r} ({error})") from error


class EventLog:
    """The events of a run so far, in memory and, with a path, in a file of JSON lines."""

    def __init__(self, path: Path | None, step: int) -> None:
        """Opens the log for a run that continues at ``step``: what a lost session reported beyond it is dropped."""
        self._path = path
        self.events = [] if path is None else read_events(path, step)
        if path is not None:
            _rewrite(path, self.events)

    def append(self, event: Event) -> None:
        """TrainingError where the disk does not take it."""
        self.events.append(replace(event, images=None))
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_line(event) + "\n")
        except OSError as error:
            raise TrainingError(
                f"Cannot write {self._path}: {error}. The last checkpoint is intact, and the run can be continued."
            ) from error


def read_events(path: Path, step: int | None = None) -> list[Event]:
    """The events of a log up to ``step`` (None = all). A last line that was cut short by a kill is skipped."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    events = [from_line(line) for line in whole.splitlines()]
    return [event for event in events if step is None or event.step <= step]


def _rewrite(path: Path, events: Iterable[Event]) -> None:
    text = "".join(to_line(event) + "\n" for event in events)
    write_atomically(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
