"""ComfyUI's folders: where pictures come from, and where adapters and runs go."""

import os
import tempfile
from pathlib import Path, PurePath

import folder_paths

ADAPTERS = "loras"  # folder_paths' name for it
FORBIDDEN = set('<>:"|?*')  # in names of files on Windows
RUNS = "stylewright"  # under ComfyUI's output folder


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


def free_adapter_path(pattern: str) -> Path:
    """A file that does not exist yet in the first LoRA folder, ``pattern_00001_.safetensors`` and counting.

    ``pattern`` may name a subfolder and hold ComfyUI's %year% and its kin. ValueError for one that leads out of the
    folder, or where nothing can be written.
    """
    parts = PurePath(pattern.replace("\\", "/"))
    if not parts.name.strip(" .") or parts.is_absolute() or ".." in parts.parts or parts.drive:
        raise ValueError(
            f"the file name {pattern!r} does not name a file inside models/loras: for example 'styles/mine'"
        )
    if bad := sorted(set(pattern) & FORBIDDEN | {sign for sign in pattern if not sign.isprintable()}):
        raise ValueError(
            f"the file name {pattern!r} holds {', '.join(map(repr, bad))}, which some systems do not allow"
        )
    parts = parts.with_suffix("") if parts.suffix == ".safetensors" else parts
    base = Path(folder_paths.get_folder_paths(ADAPTERS)[0])
    require_writable(base / parts.parent)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(parts.as_posix(), str(base))
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def run_folder(name: str) -> Path:
    """The folder of the run ``name`` under ComfyUI's output folder. ValueError where nothing can be written."""
    folder = Path(folder_paths.get_output_directory()) / RUNS / name
    require_writable(folder)
    return folder


def require_writable(folder: Path) -> None:
    """Makes the folder. ValueError names it if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"nothing can be written to {folder}: {error.strerror}") from error
