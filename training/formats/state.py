"""Nested state (of optimisers, loops, modules) in one safetensors file, without pickle.

Tensors become the file's tensors; the tree around them is JSON in the file's metadata. A file is written
beside its final name and renamed, so that a reader sees the old one or the new one and nothing between.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

VERSION = 1


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary name beside ``path`` and renames the result into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors' are for their owner alone
        with temporary.open("r+b") as file:  # Windows syncs nothing that is open for reading only
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """What the user keeps from others, which only setting it tells."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Removes what a killed process left of :func:`write_atomically`. ``name``: pattern of the files it was to be."""
    for temporary in folder.glob(f".{name}.*.tmp"):
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: Path, expected: str) -> Iterator[safe_open]:
    """A safetensors file, nothing of it read yet. ValueError for a truncated or foreign one says what was expected."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: expected {expected}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off, or no safetensors file ({error}): expected {expected}") from error


def save_state(path: Path, state: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Saves a tree of dicts, lists, tuples, tensors and plain values."""
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_pack(state, tensors))
    header = {**(metadata or {}), "stylewright.state": tree, "stylewright.state_version": str(VERSION)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))


def load_state(path: Path, *, at: Sequence[str] = (), tensors: bool = True) -> Any:
    """The tree that :func:`save_state` wrote, or its branch under the keys ``at``. ValueError for any other file.

    Without ``tensors`` they are None, and of a file of any size only the header is read.
    """
    with opened(path, "a Stylewright checkpoint") as file:
        header = file.metadata() or {}
        version = header.get("stylewright.state_version")
        if version is None:
            raise ValueError(f"{path} is a safetensors file of something else: expected a Stylewright checkpoint")
        if version != str(VERSION):
            raise ValueError(f"{path} is a Stylewright checkpoint of version {version}: expected version {VERSION}")
        tree = json.loads(header["stylewright.state"])
        for key in at:
            tree = dict(tree["dict"])[key]
        return _unpack(tree, file.get_tensor if tensors else lambda name: None)


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        # A copy: safetensors refuses tensors that share memory, and training goes on meanwhile.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot save a {type(value).__name__} in a checkpoint: {value!r}")


def _unpack(value: Any, tensor: Callable[[str], torch.Tensor | None]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: _unpack(item, tensor) for key, item in content}
    items = [_unpack(item, tensor) for item in content]
    return tuple(items) if kind == "tuple" else items
