"""A run's folder: what it leaves behind, and how it is opened again.

    config.json              the resolved configuration
    plan.json                what the run was expected to take of memory and time, by whoever planned it
    events.jsonl             one line a report
    checkpoint.safetensors   everything needed to continue exactly
    parts-<step>/            what of it is in parts on several processes, which write them there
    adapter.safetensors      the adapter as of that checkpoint
    samples/                 pictures, by step
    run.lock                 held by the process that writes here

Everything but the log is written beside its final name and renamed, so that a process killed at any moment leaves
a checkpoint that can be read. The checkpoint comes first and counts: what else is there is made again from it.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from ..data.cache import digest
from ..errors import IncompatibleCheckpoint, TrainingError
from ..formats.adapters import save_adapter
from ..formats.metadata import AdapterMetadata, build_metadata
from ..formats.state import load_state, remove_unfinished, save_state, write_atomically
from ..formats.styles import Weights
from ..formats.whole import save_whole
from ..processes import Processes
from .config import RunConfig, TrainConfig, config_from_table
from .differing import listed
from .samples import save_samples
from .tables import differences, from_table, to_table

logger = logging.getLogger(__name__)

# What a continued run may change. ``steps`` may too, where nothing depends on it.
FREE = {"steps", "save_every", "report_every", "sample_every", "sample_prompts", "gradient_checkpointing", "memory"}
RESULT = ("step", "seconds", "losses")  # of a learner's state, what is kept of a run that cannot be continued any more
CHECKPOINT = "checkpoint.safetensors"
PARTS = "parts"  # in a learner's state, the folder with what is missing in it; and how its name begins
SPARE_BYTES = 16 * 2**20
# Bytes on disk for each byte of adapter: itself, an average and up to three states of an optimiser, in the old
# checkpoint and in the new one beside it, and the adapter's own file twice.
DISK_FACTOR = 12


def free(config: RunConfig) -> set[str]:
    """The options that a continued run with this configuration may change."""
    return FREE - {"steps"} if config.depends_on_steps else FREE


def key_of(config: RunConfig, identity: Mapping[str, Any]) -> str:
    """A hash of all that a continued run may not change."""
    fixed = {name: value for name, value in to_table(config).items() if name not in free(config)}
    return digest(json.dumps([fixed, dict(identity)], sort_keys=True, default=str))


@dataclass(frozen=True)
class Stored:
    """What a checkpoint says of itself, read without its tensors."""

    config: Mapping[str, Any]  # as a table
    identity: Mapping[str, Any]  # what else tells the run from others
    step: int  # optimizer steps done
    continuable: bool  # False where only the result was kept

    def differences(self, config: RunConfig, identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What forbids to continue with other options: (was, is) by dotted name. Nothing = the same run."""
        pairs = differences({**self.config, **self.identity}, {**to_table(config), **identity})
        return {name: pair for name, pair in pairs.items() if name not in free(config)}


class RunDirectory:
    """The files of one run. Made by :func:`open_run`."""

    def __init__(self, path: Path, kind: type[RunConfig] = TrainConfig) -> None:
        self.path, self.kind = path, kind
        self.config = path / "config.json"
        self.events = path / "events.jsonl"
        self.checkpoint = path / CHECKPOINT
        self.adapter = path / "adapter.safetensors"
        self.samples = path / "samples"

    def stored(self) -> Stored | None:
        """What is in the checkpoint, None where there is none yet. IncompatibleCheckpoint where it is unreadable."""
        if not self.checkpoint.exists():
            return None
        try:
            saved = load_state(self.checkpoint, tensors=False)
            # Through the dataclass, so that an option which is newer than the file has its default.
            config = to_table(from_table(self.kind, saved["config"]))
            learner = saved["learner"]
            return Stored(config, saved["identity"], learner["step"], "optimizer" in learner)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise IncompatibleCheckpoint(
                f"{self.checkpoint} cannot be read as the checkpoint of a training run ({error}). It may be damaged, "
                "or of a newer Stylewright: update it, or choose another folder."
            ) from error

    def load(self, config: RunConfig, identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The learner's state from the checkpoint, None where there is none yet.

        IncompatibleCheckpoint where the file is unreadable, or belongs to a run with other options or other data.
        """
        stored = self.stored()
        if stored is None:
            self._refuse_a_result()
            return None
        if differing := stored.differences(config, identity):
            raise IncompatibleCheckpoint(
                f"{self.checkpoint} belongs to another run: {listed(differing)}. Continue it with what it began with, "
                "or choose another folder."
            )
        if stored.step > config.steps:
            raise IncompatibleCheckpoint(
                f"{self.checkpoint} has {stored.step} steps already, more than steps={config.steps}: ask for more "
                "steps, or choose another folder."
            )
        if not stored.continuable:
            raise IncompatibleCheckpoint(
                f"{self.checkpoint} holds the figures of a finished run, but no longer what it takes to continue it: "
                "choose another folder."
            )
        state = load_state(self.checkpoint, at=["learner"])
        whole = {name: tensor for name, tensor in state["adapter"].items() if isinstance(tensor, Tensor)}
        if bad := [name for name, tensor in whole.items() if not bool(tensor.isfinite().all())]:
            raise IncompatibleCheckpoint(
                f"{self.checkpoint} is damaged: {bad[0]} holds NaN or infinity, which no run writes. Restore the file "
                "from a backup, or begin a new run."
            )
        return state

    def _refuse_a_result(self) -> None:
        """IncompatibleCheckpoint where a run without its checkpoint left what a new one would write over."""
        if self.adapter.exists() and self.events.exists() and self.events.stat().st_size:
            raise IncompatibleCheckpoint(
                f"{self.path} has the result of a run, {self.adapter.name}, but no checkpoint to continue it from: "
                "choose another folder, or move that file away to begin anew here."
            )

    def losses(self) -> list[float]:
        """The mean loss of each step up to the checkpoint."""
        return load_state(self.checkpoint, at=["learner", "losses"]).tolist()

    def forget_state(self) -> None:
        """Drops what only a continuation needs, several times the adapter's size, and the adapter's copy here."""
        result = {name: load_state(self.checkpoint, at=["learner", name]) for name in RESULT}
        content = {**load_state(self.checkpoint, tensors=False), "learner": result}
        with self._disk_errors(self.checkpoint):
            save_state(self.checkpoint, content)
        self.clear(f"{PARTS}-*")
        self.adapter.unlink(missing_ok=True)

    def save(self, state: Mapping[str, Any], config: RunConfig, identity: Mapping[str, Any]) -> None:
        """Writes the checkpoint. TrainingError where the disk does not take it; the one before is then intact."""
        content = {"config": to_table(config), "identity": dict(identity), "learner": state}
        with self._disk_errors(self.checkpoint):
            save_state(self.checkpoint, content)
        self.clear(f"{PARTS}-*", but=state.get(PARTS))

    def require_space(self, trained: int, advice: str = "") -> None:
        """ValueError if the disk is too full for the checkpoints of a run that trains so many bytes."""
        kept = [self.checkpoint, self.adapter, *self.path.glob(f"{PARTS}-*/*")]  # which the next ones replace
        held = sum(file.stat().st_size for file in kept if file.is_file())
        needed, free = DISK_FACTOR * trained + SPARE_BYTES - held, shutil.disk_usage(self.path).free
        if free < needed:
            raise ValueError(
                f"{self.path} has {free / 2**20:.0f} MiB free and the checkpoints of this run need up to "
                f"{needed / 2**20:.0f} MiB: make room, choose another folder{advice}."
            )

    def clear(self, pattern: str, *, but: str | None = None) -> None:
        """Removes the folders of parts that are called so."""
        for folder in self.path.glob(pattern):
            if folder.name != but:
                shutil.rmtree(folder)

    def save_config(self, config: RunConfig) -> None:
        text = json.dumps(to_table(config), indent=2, ensure_ascii=False) + "\n"
        with self._disk_errors(self.config):
            write_atomically(self.config, lambda temporary: _write_text(temporary, text))

    def save_adapter(self, state: Mapping[str, Tensor], about: AdapterMetadata, weights: Weights) -> None:
        """Writes the adapter's file. ``weights`` gives a layer's frozen weight, which some methods' files need."""
        with self._disk_errors(self.adapter):
            save_adapter(self.adapter, state, build_metadata(about), weights=weights)

    def save_whole(self, state: Mapping[str, Tensor], about: AdapterMetadata) -> None:
        """Writes a network's file where an adapter's would be."""
        with self._disk_errors(self.adapter):
            save_whole(self.adapter, state, about)

    def save_images(self, step: int, images: Tensor, prompts: Sequence[str] = ()) -> None:
        """Writes pictures (b, 3, h, w) in [0, 1] as PNG, which name their prompts."""
        with self._disk_errors(self.samples):
            save_samples(self.samples, step, images, prompts)

    def _disk_errors(self, path: Path) -> AbstractContextManager[None]:
        return disk_errors(path, self.checkpoint)


@contextmanager
def disk_errors(path: Path, checkpoint: Path) -> Iterator[None]:
    """TrainingError where ``path`` cannot be written, which says what there is of ``checkpoint``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        rest = (
            "The last checkpoint is intact, and the run can be continued from it"
            if checkpoint.is_file()
            else "The run had no checkpoint yet, and nothing of it is kept: see that the disk has room and that "
            "the folder can be written to, or choose another, and begin again"
        )
        raise TrainingError(f"Cannot write {path}: {error}. {rest}.") from error


@contextmanager
def open_run(path: Path, kind: type[RunConfig] = TrainConfig) -> Iterator[RunDirectory]:
    """The folder of a run, made if it is not there, and locked. ``kind``: the class of its options.

    ValueError where it cannot be written to; TrainingError while another process writes there.
    """
    run = RunDirectory(path, kind)
    require_writable(path)
    lock = FileLock(path / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrainingError(f"Another process is training in {path}: wait for it, or choose another folder.") from error
    try:
        for folder in (path, run.samples):
            remove_unfinished(folder)
        yield run
    finally:
        lock.release()


@contextmanager
def opened_by_one(
    run: Path | RunDirectory | None, processes: Processes, kind: type[RunConfig] = TrainConfig
) -> Iterator[RunDirectory | None]:
    """The folder of a run in the process that writes, None in the others. One that is open already stays open."""
    with ExitStack() as stack:
        with processes.together():
            if isinstance(run, Path) and processes.writes:
                run = stack.enter_context(open_run(run, kind))
        yield run if isinstance(run, RunDirectory) and processes.writes else None


def read_config(path: Path) -> TrainConfig:
    """The configuration of the run in the folder ``path``. ValueError where there is none."""
    file = RunDirectory(path).config
    try:
        return config_from_table(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the folder of a training run: {error}") from error


def require_writable(path: Path) -> None:
    """Makes the folder of a run and a file in it. ValueError where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "probe", lambda temporary: _write_text(temporary, "probe"))
        (path / "probe").unlink()
    except OSError as error:
        file = next((each for each in (path, *path.parents) if each.is_file()), None)
        why = f"{file} is a file" if file else str(error)
        raise ValueError(f"Cannot write into {path}: {why}. Choose another folder for the run.") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
