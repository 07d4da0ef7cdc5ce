"""What a run is asked for on top of its options: model, pictures and folder. From a TOML file and flags."""

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..adapters.methods import AdapterConfig, refuse_idle
from ..data.concepts import PICTURES, PRIOR_SHARE, PRIOR_WEIGHT, PRIORS, check_prior_share
from ..errors import IncompatibleCheckpoint
from ..formats.state import write_atomically
from ..loops.config import TrainConfig, config_from_table
from ..loops.differing import listed
from ..loops.tables import differences, from_table, to_table

FILE = "job.json"  # in the folder of a run, so that it can be resumed without repeating anything
RUNS = Path("runs")
MAY_CHANGE = {"device", "out"}  # when a run is continued


@dataclass(frozen=True)
class Pictures:
    """A concept in a TOML file, ``[[concepts]]``. What it leaves out is as the run has it."""

    images: str  # as of a job
    style_phrase: str | None = None
    caption_mode: str | None = None
    repeats: int = 1
    resolutions: tuple[int, ...] = ()
    caption_orders: int | None = None
    keep_tags: int | None = None


@dataclass(frozen=True)
class Job:
    """Where a run takes its model and pictures from, and where it leaves its results."""

    images: str | tuple[str, ...] = ""  # folders with captions beside the pictures, or .jsonl files
    repeats: tuple[int, ...] = ()  # of each of them; () = 1
    concepts: tuple[Pictures, ...] = ()  # instead of images: in a TOML file only
    model: str = "embedded"
    components: str | None = None  # for a single-file model: the diffusers folder with what the file lacks
    caption_mode: str = "content"
    caption_orders: int = 1
    keep_tags: int = 0
    more_resolutions: tuple[int, ...] = ()
    alpha_masks: bool = False
    regularisation: str | None = None  # as images
    prior_weight: float = PRIOR_WEIGHT
    prior_share: float = PRIOR_SHARE
    prior_target: str = PICTURES  # one of PRIORS
    device: str = "auto"
    out: str | None = None  # None = a new folder in runs/
    init_adapter: str | None = None  # a file to begin with; None = an adapter that does nothing yet

    def __post_init__(self) -> None:
        if bool(self.images) == bool(self.concepts):
            raise ValueError(
                "--images names a folder with pictures and their captions, and a TOML file may have [[concepts]] "
                f"instead: got {'both' if self.images else 'no pictures to learn from'}"
            )
        if len(self.repeats) not in (0, 1, len(self.folders)):
            raise ValueError(f"Got {len(self.repeats)} repeats for {len(self.folders)} folders: expected one for each")
        check_prior_share(self.prior_share)
        if self.prior_target not in PRIORS:
            raise ValueError(f"Got prior_target={self.prior_target!r}: expected one of {', '.join(PRIORS)}")

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of ``images``."""
        return self.images if isinstance(self.images, tuple) else (self.images,)

    @property
    def all_concepts(self) -> tuple[Pictures, ...]:
        """``images`` with their repeats as concepts, or the concepts."""
        times = self.repeats * len(self.folders) if len(self.repeats) == 1 else self.repeats
        times = times or (1,) * len(self.folders)
        return self.concepts or tuple(
            Pictures(folder, repeats=n) for folder, n in zip(self.folders, times, strict=True)
        )


HELP = {
    "images": "Folder of pictures with a caption each (cat.txt beside cat.png, or one .jsonl file); may be repeated.",
    "repeats": "How often the pictures of a folder are seen while others are seen once; one for each --images.",
    "model": 'What to train on: "embedded", a diffusers folder, or a .safetensors checkpoint. Nothing is downloaded.',
    "components": "For a .safetensors checkpoint: the diffusers folder with its tokenizers and what else it lacks.",
    "caption_mode": '"content": captions become "{content} in {style phrase} style"; "full": they are complete; '
    '"plain": nothing is asked of them.',
    "caption_orders": "In how many orders the tags between a caption's commas are trained; 1 = as written.",
    "keep_tags": "How many tags stay in front in every order.",
    "more_resolutions": "A further size at which the same pictures are trained; may be repeated.",
    "alpha_masks": "Learn only from the opaque parts of the pictures.",
    "regularisation": "Folder of pictures of what the model is to keep, with complete captions, as of --images.",
    "prior_weight": "The loss is the style's plus this times the regularisation's, whatever their share.",
    "prior_share": "Share of the samples that are regularisation.",
    "prior_target": '"pictures": regularisation pictures are learned as they are; "base": what the model without the '
    "adapter predicts on them, or without --regularisation on the style's own pictures, captioned without the phrase.",
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
    refuse_idle_options(table)
    ours, rest = sorted_out(table, Job, TrainConfig)
    return from_table(Job, ours), config_from_table(rest)


def refuse_idle_options(table: Mapping[str, Any]) -> None:
    """ValueError for an option of one adapter method that a user stated with another, whatever its value."""
    stated = table.get("adapter", {})
    if isinstance(stated, Mapping):
        refuse_idle(stated.get("method", AdapterConfig.method), stated)


def sorted_out(table: Mapping[str, Any], job: Any, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a table belongs to the one dataclass and what to the other. ValueError names an unknown option."""
    ours = {field.name for field in fields(job)}
    known = ours | {field.name for field in fields(config)}
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known))}."
            raise ValueError(f"Unknown option {name}: {advice}")
    return (
        {name: value for name, value in table.items() if name in ours},
        {name: value for name, value in table.items() if name not in ours},
    )


def located(job: Job) -> Job:
    """The job with absolute paths, so that its run can be continued from anywhere."""
    folders = tuple(map(_absolute, job.folders))
    return replace(
        job,
        images=job.images and (folders if len(folders) > 1 else folders[0]),
        concepts=tuple(replace(concept, images=_absolute(concept.images)) for concept in job.concepts),
        model=job.model if job.model == "embedded" else _absolute(job.model),
        components=job.components and _absolute(job.components),
        init_adapter=job.init_adapter and _absolute(job.init_adapter),
        regularisation=job.regularisation and _absolute(job.regularisation),
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def folder_of(job: Job) -> Path:
    """The folder of the run: the one that was named, or the next free one in runs/."""
    if job.out is not None:
        return Path(job.out)
    name = Path(job.all_concepts[0].images).stem
    candidates = (RUNS / (name if number == 1 else f"{name}-{number}") for number in range(1, 1_000_000))
    return next(path for path in candidates if not path.exists())


def keep(job: Job, folder: Path) -> None:
    """Writes the job into the folder of its run. IncompatibleCheckpoint if another job's run is there."""
    if (folder / FILE).exists():
        differing = differences(to_table(recall(folder)), to_table(job))
        if differing := {name: pair for name, pair in differing.items() if name not in MAY_CHANGE}:
            raise IncompatibleCheckpoint(f"{folder} holds another run: {listed(differing)}. Choose another folder.")
    text = json.dumps(to_table(job), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / FILE, lambda temporary: _write(temporary, text))


def recall(folder: Path) -> Job:
    """The job of the run in this folder. ValueError where there is none."""
    try:
        return from_table(Job, json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        if (folder / "config.json").is_file() and isinstance(error, FileNotFoundError):
            raise ValueError(
                f"{folder} is no run of `stylewright train`. If `stylewright distill` made it, give that command again "
                f"as it was, with --out {folder}: it continues"
            ) from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{folder} is not the folder of a run of `stylewright train`: {FILE} in it: {reason}"
        ) from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
