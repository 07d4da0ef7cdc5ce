"""A run's adapters in models/loras: where ComfyUI's loaders list them, whole or not at all, and never overwritten.

The first finished one is called mine_00003_.safetensors. What comes before it, and after it where the run is trained
further, has its step in its name: mine_00003_step000100.safetensors. Below, ``stem`` is …/mine_00003.
"""

import glob
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from ...training.formats.contents import read_about
from ...training.formats.state import remove_unfinished, write_atomically
from .files import refresh_adapter_names

ENDING = ".safetensors"


def published(stem: Path, step: int) -> Path | None:
    """The file that holds the run's adapter of this step; None where there is none."""
    return next((path for path in _names(stem, step) if steps_of(path) == step), None)


def publish(source: Path, stem: Path, *, finished: bool) -> Path:
    """Copies a run's adapter into the LoRA folder, unless its step is there already. The file."""
    step = steps_of(source) or 0
    path = published(stem, step)
    if path is None:
        names = _names(stem, step)
        candidates = [*(names if finished else names[1:])]
        path = next(path for path in _endless(candidates, stem, step) if not path.exists())
        write_atomically(path, lambda temporary: copy(source, temporary))
        refresh_adapter_names()
    return path


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def clear_unfinished(stem: Path) -> None:
    """Removes what a killed process left half copied. Nobody else may be publishing for this run."""
    remove_unfinished(stem.parent, f"{glob.escape(stem.name)}_*")


def steps_of(path: Path) -> int | None:
    """Steps of an adapter of ours; None for what is missing, damaged or another tool's."""
    try:
        about = read_about(path)
    except (OSError, ValueError):
        return None
    return about.steps if about else None


def _names(stem: Path, step: int) -> list[Path]:
    return [stem.with_name(f"{stem.name}_{each}{ENDING}") for each in ("", f"step{step:06}")]


def _endless(names: list[Path], stem: Path, step: int) -> Iterator[Path]:
    """With further ones, for where somebody else's files have these."""
    yield from names
    yield from (stem.with_name(f"{stem.name}_step{step:06}_{number}{ENDING}") for number in count(2))
