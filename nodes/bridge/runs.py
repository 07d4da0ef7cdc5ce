"""Runs inside ComfyUI: found again by the trainer's file name and by what was asked for, begun, and cleared away.

Each has a folder below output/stylewright, whose name and number are those of its adapters in models/loras.
"""

import glob
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...training.errors import IncompatibleCheckpoint, TrainingError
from ...training.formats.state import remove_unfinished, write_atomically
from ...training.loops.checkpoint import RunDirectory, Stored, key_of, open_run
from ...training.loops.config import RunConfig, TrainConfig
from ...training.loops.differing import in_words
from ...training.loops.distil_config import DistilConfig
from ...training.loops.teaching import Answers
from .files import adapter_folder, first_number, require_writable, runs_folder
from .publishing import clear_unfinished, published, steps_of
from .resuming import ANEW, AS_IT_IS, AUTOMATIC, CONTINUE, RESUME

logger = logging.getLogger(__name__)

RECORD = "run.json"  # beside what the run itself leaves behind
ENCODED = "encoded"  # a folder of pictures and captions as they were encoded
ANSWERS = "answers"  # of a teacher, while they are needed
VERSION = 1
KINDS: dict[str, type[RunConfig]] = {"train": TrainConfig, "distil": DistilConfig}  # by what their records say


@dataclass(frozen=True)
class Run:
    """A folder, and where its adapters go."""

    folder: Path
    pattern: str  # the trainer's file name, as it was typed
    adapter: str  # below the LoRA folder, without ending: "styles/mine_00003"
    kind: type[RunConfig] = TrainConfig  # of its options

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def directory(self) -> RunDirectory:
        """To read from. What writes opens it: see :func:`opened`."""
        return RunDirectory(self.folder, self.kind)

    @property
    def stem(self) -> Path:
        """Of the adapters' files."""
        return adapter_folder() / self.adapter

    def write_record(self) -> None:
        kind = next(name for name, kind in KINDS.items() if kind is self.kind)
        record = {"version": VERSION, "kind": kind, "pattern": self.pattern, "adapter": self.adapter}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.folder / RECORD, lambda temporary: _write(temporary, text))


@dataclass(frozen=True)
class Found:
    """A run that can be read, and what forbids to continue it with the options of now."""

    run: Run
    stored: Stored
    differing: Mapping[str, tuple[Any, Any]]  # (was, is) by dotted name
    steps: int  # that are asked for now

    @property
    def obstacle(self) -> str:
        """Why it cannot be continued, "" where it can."""
        if self.differing:
            return "; ".join(OF_MODELS.get(name) or in_words(name, *pair) for name, pair in self.differing.items())
        if self.stored.step > self.steps:
            return f"it has {self.stored.step} steps already, and steps is {self.steps}"
        if not self.stored.continuable and (self.stored.step < self.steps or not has_adapter(self.run, self.steps)):
            return "its checkpoint is gone: only the newest finished runs keep theirs (keep_checkpoints)"
        return ""


# Entries of a run's identity that only ComfyUI's runs have, as :mod:`...training.loops.differing` says the others.
OF_MODELS = {
    "model.weights": "the model's weights, or the LoRAs and patches on it, are others",
    "model.functions": "what other nodes changed of how the model computes (FreeU, attention patches, …) is different",
    "encoders.clip": "the text encoder is another",
    "encoders.vae": "the VAE is another",
    "teacher.weights": "the teacher, or the LoRAs and patches on it, are others",
    "teacher.functions": "what other nodes changed of how the teacher computes is different",
}


def has_adapter(run: Run, step: int) -> bool:
    """Whether the adapter of this step is in models/loras, or at least in the run's folder."""
    return published(run.stem, step) is not None or steps_of(run.directory.adapter) == step


def runs_of(pattern: str, kind: type[RunConfig] = TrainConfig) -> list[tuple[Run, Stored]]:
    """The runs of a trainer's file name that hold a checkpoint, the one that was written to last first."""
    ours = (run for run in all_runs() if (run.pattern, run.kind) == (pattern, kind))
    found = [(run, stored) for run in ours if (stored := _stored(run))]
    return sorted(found, key=lambda pair: (last_written(pair[0]), pair[0].name), reverse=True)


def damage_of(pattern: str, filled: str, kind: type[RunConfig] = TrainConfig) -> str:
    """What is wrong with the runs of a trainer's file name that cannot be read; "" where there is nothing.

    A run whose record is damaged is known by its folder alone, which the filled-in pattern names.
    """
    damaged = []
    for path in sorted(runs_folder().glob(f"{glob.escape(_folder_name(filled))}_*/{RECORD}")):
        try:
            _read_record(path)
        except ValueError as error:
            damaged.append(f"{error} Its adapters are still in models/loras")
    for run in all_runs():
        if (run.pattern, run.kind) == (pattern, kind) and run.directory.checkpoint.exists():
            try:
                run.directory.stored()
            except IncompatibleCheckpoint as error:
                kept = run.directory.adapter
                damaged.append(f"{error} Its adapter is still {kept}" if kept.exists() else str(error))
    return "\n".join(damaged)


def all_runs() -> Iterator[Run]:
    """Every folder with a record that can be read."""
    for path in sorted(runs_folder().glob(f"*/{RECORD}")):
        try:
            yield _read_record(path)
        except ValueError as error:
            logger.warning("%s", error)


def _read_record(path: Path) -> Run:
    """The run of a record. ValueError where it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Run(path.parent, record["pattern"], record["adapter"], KINDS[record.get("kind", "train")])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as the record of a run, which is passed over ({error}).") from error


def lost_adapters(pattern: str, kind: type[RunConfig] = TrainConfig) -> list[str]:
    """Runs of a trainer's file name whose adapter somebody has deleted from models/loras since."""
    return [run.name for run, stored in runs_of(pattern, kind) if stored.step and not published(run.stem, stored.step)]


def last_written(run: Run) -> int:
    """Time of the checkpoint in nanoseconds; 0 where there is none."""
    try:
        return run.directory.checkpoint.stat().st_mtime_ns
    except OSError:
        return 0


def _stored(run: Run) -> Stored | None:
    try:
        return run.directory.stored()
    except IncompatibleCheckpoint as error:
        logger.warning("%s", error)
        return None


@dataclass(frozen=True)
class Choice:
    """What a queued job does."""

    run: Run | None  # None = a new one
    stored: Stored | None
    trains: bool
    notice: str  # for the node and the log; "" = nothing worth saying


def choose(pattern: str, filled: str, resume: str, config: RunConfig, identity: Mapping[str, Any]) -> Choice:
    """The run that the options mean. ``filled`` is the pattern with its words, as a new run would take it.

    TrainingError where ``resume`` asks for what cannot be: IncompatibleCheckpoint names all that differs.
    """
    if resume not in RESUME:
        raise ValueError(f"Got resume={resume!r}: expected one of {', '.join(RESUME)}.")
    if resume == ANEW:
        return Choice(None, None, True, "")
    kind = type(config)
    found = [
        Found(run, stored, stored.differences(config, identity), config.steps) for run, stored in runs_of(pattern, kind)
    ]
    if resume == AS_IT_IS:
        return _as_it_is(found, pattern)
    fitting = [each for each in found if not each.obstacle]
    if fitting:
        return _continued(max(fitting, key=lambda each: each.stored.step))
    if asked := _asked(pattern, config, identity):
        return asked
    damage = damage_of(pattern, filled, kind)
    if resume == CONTINUE:
        raise TrainingError(damage) if damage and not found else _refusal(found, pattern)
    nearest = _nearest(found) if found else None
    reasons = [f"{nearest.run.name} is not continued: {nearest.obstacle}"] if nearest else []
    reasons += [damage] if damage else []
    return Choice(None, None, True, "\n".join([*reasons, "A new run begins"]) if reasons else "")


def _continued(found: Found) -> Choice:
    done, steps, name = found.stored.step, found.steps, found.run.name
    if done == steps and has_adapter(found.run, done):
        return Choice(found.run, found.stored, False, f"{name} has its {steps} steps: nothing was left to train")
    notice = f"{name} goes on at step {done} of {steps}" if done else ""
    return Choice(found.run, found.stored, True, notice)


def _asked(pattern: str, config: RunConfig, identity: Mapping[str, Any]) -> Choice | None:
    """A run that was stopped before its first step, while its teacher was asked."""
    for run in all_runs():
        ours = (run.pattern, run.kind) == (pattern, type(config)) and not run.directory.checkpoint.exists()
        if ours and (count := len(answers_of(run, config, identity))):
            return Choice(run, None, True, f"{run.name} goes on: {count} steps of the teacher's answers are kept")
    return None


def answers_of(run: Run, config: RunConfig, identity: Mapping[str, Any]) -> Answers:
    """A teacher's answers to the batches of a run with these options."""
    return Answers(run.folder / ANSWERS, f"{key_of(config, identity)[:12]}-")


def _as_it_is(found: list[Found], pattern: str) -> Choice:
    """The run of these options, or else the last one of this file name."""
    trained = [each for each in found if each.stored.step]
    if not trained:
        raise TrainingError(
            f"there is no run of the file name {pattern!r} that has learned anything yet: set resume to {AUTOMATIC!r}"
        )
    same = [each for each in trained if not each.differing]
    each = max(same, key=lambda each: each.stored.step) if same else trained[0]
    notice = f"{each.run.name} as it is after {each.stored.step} steps: nothing was trained"
    return Choice(each.run, each.stored, False, notice if same else f"{notice}. Its options differ: {each.obstacle}")


def _refusal(found: list[Found], pattern: str) -> TrainingError:
    if not found:
        return TrainingError(
            f"there is no run of the file name {pattern!r} to continue: set resume to {AUTOMATIC!r} to begin one"
        )
    nearest = _nearest(found)
    back = "Put this back, or set" if nearest.differing else "Set"
    return IncompatibleCheckpoint(
        f"{nearest.run.name} cannot be continued exactly: {nearest.obstacle}. {back} resume to {ANEW!r}; {AS_IT_IS!r} "
        "gives its adapter as it is"
    )


def _nearest(found: list[Found]) -> Found:
    """The run that a user most likely means: of the same options, although it cannot go on, or else the last one."""
    return next((each for each in found if not each.differing), found[0])


def new_run(pattern: str, filled: str, kind: type[RunConfig] = TrainConfig) -> Run:
    """A folder with the next free number, for adapters of the filled-in pattern. ValueError where it cannot be made."""
    require_writable(runs_folder())
    number = first_number(filled)
    while True:
        run = Run(runs_folder() / f"{_folder_name(filled)}_{number:05}", pattern, f"{filled}_{number:05}", kind)
        try:
            run.folder.mkdir()
        except FileExistsError:
            if not run.folder.is_dir() or not _abandoned(run):
                number += 1
                continue
        run.write_record()
        return run


def _folder_name(filled: str) -> str:
    return filled.replace("/", "-")


def _abandoned(run: Run) -> bool:
    """Whether the folder is one that a process was killed in before the first checkpoint."""
    left = {path.name for path in run.folder.iterdir()}
    if run.directory.checkpoint.name in left or (left and RECORD not in left) or _has_answers(run):
        return False
    try:
        with open_run(run.folder):
            return True
    except (TrainingError, ValueError):  # somebody is at work in it
        return False


def _has_answers(run: Run) -> bool:
    """Of a teacher, to whichever options: too much time to be thrown away."""
    return len(Answers(run.folder / ANSWERS)) > 0


@contextmanager
def opened(run: Run) -> Iterator[RunDirectory]:
    """The run's folder, locked and without what a killed process left half written, beside its adapters too.

    A run that comes to nothing inside, without a first checkpoint or a teacher's answer, leaves no folder.
    """
    try:
        with open_run(run.folder, run.kind) as directory:
            run.write_record()  # again: somebody may have cleared the folder
            clear_unfinished(run.stem)
            remove_unfinished(run.folder / ENCODED)
            yield directory
    finally:
        if not run.directory.checkpoint.exists() and not _has_answers(run):
            shutil.rmtree(run.folder, ignore_errors=True)


def clear_states(pattern: str, keep: int, kind: type[RunConfig] = TrainConfig) -> list[str]:
    """Of a file name's finished runs only the ``keep`` newest keep what it takes to train them further.

    Figures and adapters stay. The names of the runs that were cleared now.
    """
    found = runs_of(pattern, kind)
    finished = [run for run, stored in found if stored.continuable and stored.step == stored.config["steps"]]
    cleared = []
    for run in finished[keep:]:
        try:
            with open_run(run.folder, kind) as directory:
                directory.forget_state()
                cleared.append(run.name)
                shutil.rmtree(run.folder / ENCODED, ignore_errors=True)
        except (TrainingError, ValueError, OSError) as error:  # in use, or a disk that refuses: another time
            logger.warning("the checkpoint of %s stays: %s", run.name, error)
    return cleared


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
