"""What a run is asked for on top of its options: model, pictures and folder. From a TOML file and flags."""

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import IncompatibleCheckpoint
from ..formats.state import write_atomically
from ..loops.config import TrainConfig, config_from_table
from ..loops.tables import differences, from_table, to_table

FILE = "job.json"  # in the folder of a run, so that it can be resumed without repeating anything
RUNS = Path("runs")
MAY_CHANGE = {"device", "out"}  # when a run is continued


@dataclass(frozen=True)
class Job:
    """Where a run takes its model and pictures from, and where it leaves its results."""

    images: str = ""  # a folder with captions beside the pictures, or a .jsonl file
    model: str = "embedded"
    components: str | None = None  # for a single-file model: the diffusers folder with what the file lacks
    caption_mode: str = "content"
    alpha_masks: bool = False
    device: str = "auto"
    out: str | None = None  # None = a new folder in runs/
    init_adapter: str | None = None  # a file to begin with; None = an adapter that does nothing yet

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("No pictures to learn from: --images names a folder with pictures and their captions")


HELP = {
    "images": "Folder of pictures with a caption each (cat.txt beside cat.png, or one .jsonl file).",
    "model": 'What to train on: "embedded", a diffusers folder, or a .safetensors checkpoint. Nothing is downloaded.',
    "components": "For a .safetensors checkpoint: the diffusers folder with its tokenizers and what else it lacks.",
    "caption_mode": '"content": captions become "{content} in {style phrase} style"; "full": they are complete.',
    "alpha_masks": "Learn only from the opaque parts of the pictures.",
    "device": '"cpu", "cuda", …; "auto" is CUDA where there is one.',
    "init_adapter": "An adapter's .safetensors file to begin with, of any common tool and the same method.",
    "out": "Folder of the run; a run that is there is continued. (default: a new one in runs/)",
}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. ValueError where it is none."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ValueError(f"Cannot read the options in {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error


def split(table: Mapping[str, Any]) -> tuple[Job, TrainConfig]:
    """The two halves of what a user stated, resolved. ValueError names an unknown option or a bad value."""
    ours = {field.name for field in fields(Job)}
    known = ours | {field.name for field in fields(TrainConfig)}
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known))}."
            raise ValueError(f"Unknown option {name}: {advice}")
    job = from_table(Job, {name: value for name, value in table.items() if name in ours})
    config = config_from_table({name: value for name, value in table.items() if name not in ours})
    return job, config


def located(job: Job) -> Job:
    """The job with absolute paths, so that its run can be continued from anywhere."""
    model = job.model if job.model == "embedded" else str(Path(job.model).expanduser().resolve())
    components = job.components and str(Path(job.components).expanduser().resolve())
    start = job.init_adapter and str(Path(job.init_adapter).expanduser().resolve())
    images = str(Path(job.images).expanduser().resolve())
    return replace(job, images=images, model=model, components=components, init_adapter=start)


def folder_of(job: Job) -> Path:
    """The folder of the run: the one that was named, or the next free one in runs/."""
    if job.out is not None:
        return Path(job.out)
    name = Path(job.images).stem
    candidates = (RUNS / (name if number == 1 else f"{name}-{number}") for number in range(1, 1_000_000))
    return next(path for path in candidates if not path.exists())


def keep(job: Job, folder: Path) -> None:
    """Writes the job into the folder of its run. IncompatibleCheckpoint if another job's run is there."""
    if (folder / FILE).exists():
        differing = differences(to_table(recall(folder)), to_table(job))
        listed = [
            f"{name} was {was!r} and is {now!r}" for name, (was, now) in differing.items() if name not in MAY_CHANGE
        ]
        if listed:
            raise IncompatibleCheckpoint(f"{folder} holds another run: {'; '.join(listed)}. Choose another folder.")
    text = json.dumps(to_table(job), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / FILE, lambda temporary: _write(temporary, text))


def recall(folder: Path) -> Job:
    """The job of the run in this folder. ValueError where there is none."""
    try:
        return from_table(Job, json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{folder} is not the folder of a run of `stylewright train`: {FILE} in it: {reason}"
        ) from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
