"""ComfyUI's folders: where pictures come from, and where adapters and runs go."""

import os
import re
import tempfile
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path, PurePath

import folder_paths

from ...training.data.items import read_folder

ADAPTERS = "loras"  # folder_paths' name for it
FORBIDDEN = set('<>:"|?*')  # in names of files on Windows
LONGEST_NAME = 180  # bytes; most systems allow 255, and runs join the parts of a name
RUNS = "stylewright"  # under ComfyUI's output folder
# ComfyUI's placeholders for times, and those of the date that its front end fills in for its own nodes.
TIMES = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}
DATE_FORMS = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}
USUAL_DATE = "yyyy-MM-dd"


def adapter_names() -> list[str]:
    """The adapter files of all of ComfyUI's LoRA folders, as its own loaders list them."""
    return folder_paths.get_filename_list(ADAPTERS)


def adapter_path(name: str) -> Path:
    """The file of a listed name. FileNotFoundError where there is none."""
    return Path(folder_paths.get_full_path_or_raise(ADAPTERS, name))


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def picture_folders() -> list[str]:
    """The folders below ComfyUI's input folder."""
    return folder_paths.get_input_subfolders()


def picture_folder(name: str) -> Path:
    """A folder below ComfyUI's input folder. ValueError for a name that leads out of it or to nothing."""
    base = Path(os.path.abspath(folder_paths.get_input_directory()))
    folder = Path(os.path.abspath(base / name))
    if folder == base or not folder.is_relative_to(base):
        raise ValueError(f"{name!r} is not a folder below ComfyUI's input folder, {base}")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {name!r} in ComfyUI's input folder, {base}")
    return folder


def input_file(name: str) -> Path:
    """A file below ComfyUI's input folder. ValueError for a name that leads out of it or to nothing."""
    base = Path(os.path.abspath(input_folder()))
    file = Path(os.path.abspath(base / name))
    if not file.is_relative_to(base) or not file.is_file():
        raise ValueError(f"there is no file {name!r} in ComfyUI's input folder, {base}")
    return file


def index_folder() -> Path:
    """Where what is found out about files of prompts is kept, until ComfyUI starts anew."""
    return Path(folder_paths.get_temp_directory()) / RUNS


def files_of(folder: Path) -> list[Path]:
    """The files that a folder's dataset is made of: its own, and those that its list names."""
    own = {path for path in folder.iterdir() if path.is_file()}
    try:
        items = read_folder(folder, within=input_folder())
    except ValueError:  # the node says what is wrong
        return sorted(own)
    named = {path for item in items for path in (item.image, item.mask) if isinstance(path, Path)}
    return sorted(own | named)


def adapter_pattern(pattern: str, words: Mapping[str, str]) -> str:
    """A file name below the first LoRA folder with its placeholders filled in, without ending and number.

    ``words``: what stands for %style% and its kin; ComfyUI's %year%, %date:yyyy-MM-dd% and theirs are known as well.
    ValueError for a name that leads out of the folder, that some systems do not allow, or with an unknown placeholder.
    """
    filled = fill(pattern, words)
    parts = PurePath(filled.replace("\\", "/"))
    if not parts.name.strip(" .") or parts.is_absolute() or ".." in parts.parts or parts.drive:
        raise ValueError(
            f"the file name {pattern!r} does not name a file inside models/loras: for example 'styles/mine'"
        )
    if bad := sorted(set(filled) & FORBIDDEN | {sign for sign in filled if not sign.isprintable()}):
        raise ValueError(
            f"the file name {pattern!r} holds {', '.join(map(repr, bad))}, which some systems do not allow"
        )
    if bad := [part for part in parts.parts if _is_reserved(part) or part != part.rstrip(" .")]:
        raise ValueError(
            f"the file name {pattern!r} holds {bad[0]!r}, which Windows does not allow: names like CON, NUL and COM1 "
            "are devices there, and none ends in a dot or a space"
        )
    parts = parts.with_suffix("") if parts.suffix == ".safetensors" else parts
    if long := [part for part in parts.parts if len(part.encode()) > LONGEST_NAME]:
        raise ValueError(
            f"{long[0][:30]}… in the file name has {len(long[0].encode())} bytes: expected at most {LONGEST_NAME}, "
            "because a number and the step are added"
        )
    require_writable(adapter_folder() / parts.parent)
    return parts.as_posix()


def _is_reserved(name: str) -> bool:
    """Whether Windows takes a file's name for a device, whatever its ending."""
    stem = name.partition(".")[0].strip().lower()
    return bool(re.fullmatch(r"con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3]", stem))


def fill(pattern: str, words: Mapping[str, str]) -> str:
    """The pattern with placeholders replaced; words cannot bring folders in. ValueError names an unknown one."""

    def replace(found: re.Match[str]) -> str:
        name, _, form = found[1].partition(":")
        if name == "date":
            return re.sub(
                "|".join(DATE_FORMS), lambda part: time.strftime(DATE_FORMS[part[0]], now), form or USUAL_DATE
            )
        if name in TIMES:
            return time.strftime(TIMES[name], now)
        if name not in words:
            known = ", ".join(f"%{each}%" for each in (*words, *TIMES, f"date:{USUAL_DATE}"))
            raise ValueError(f"the file name {pattern!r} holds %{found[1]}%, which is none of {known}")
        return "".join("_" if sign in FORBIDDEN | set("/\\%") else sign for sign in words[name]).strip(" .") or "none"

    now = time.localtime()
    return re.sub(r"%([A-Za-z_]+(?::[^%/\\]*)?)%", replace, pattern)


def adapter_folder() -> Path:
    """The first of ComfyUI's LoRA folders, where new ones go."""
    return Path(folder_paths.get_folder_paths(ADAPTERS)[0])


def first_number(pattern: str) -> int:
    """One more than the highest number that ComfyUI finds among the adapters of a filled-in pattern."""
    _, _, counter, _, _ = folder_paths.get_save_image_path(pattern, str(adapter_folder()))
    return counter


def free_adapter_path(pattern: str, words: Mapping[str, str]) -> Path:
    """A file for an adapter that does not exist yet, ``pattern_00001_.safetensors`` and counting; see above."""
    filled = adapter_pattern(pattern, words)
    names = (adapter_folder() / f"{filled}_{number:05}_.safetensors" for number in count(first_number(filled)))
    return next(path for path in names if not path.exists())


def refresh_adapter_names() -> None:
    """ComfyUI keeps its list while no folder's time of change differs; two changes within one tick have the same."""
    folder_paths.filename_list_cache.pop(ADAPTERS, None)


def runs_folder() -> Path:
    """Where runs are. It need not exist."""
    return Path(folder_paths.get_output_directory()) / RUNS


def shown_subfolder(folder: Path) -> str:
    """A folder below ComfyUI's output folder, as its /view takes it."""
    return folder.relative_to(folder_paths.get_output_directory()).as_posix()


def require_writable(folder: Path) -> None:
    """Makes the folder. ValueError names it if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = f"a file is in its place: {file}" if (file := _file_in_place_of(folder)) else error.strerror
        raise ValueError(f"nothing can be written to {folder}: {why}") from error


def _file_in_place_of(folder: Path) -> Path | None:
    """What keeps a folder, or one that it is in, from being made."""
    return next((path for path in (folder, *folder.parents) if path.is_file()), None)
