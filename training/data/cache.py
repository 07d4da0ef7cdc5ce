"""Encoded pictures and prompts on disk, found by what they were made from.

The name of a file is a hash of the content (pixels as they went into the encoder, or a prompt) and of the encoder,
so that a changed picture, caption, resolution or model is a different file and nothing has to be invalidated.
A file also carries a checksum of its tensors: one that is truncated, foreign or damaged is made again.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TrainingError
from ..formats.state import write_atomically

log = logging.getLogger(__name__)

VERSION = "1"  # of what is in a file; another number means another file name


def digest(*parts: str | int | Tensor) -> str:
    """A hash of texts, numbers and tensors: 32 hexadecimal digits. Tensors count with dtype and shape."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            state.update(repr((str(part.dtype), tuple(part.shape))).encode())
            state.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            state.update(repr(part).encode())
        state.update(b";")
    return state.hexdigest()


def digest_named(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors, in any order."""
    return digest(*(part for name in sorted(tensors) for part in (name, tensors[name])))


def settle(tensor: Tensor) -> Tensor:
    """A copy on the CPU that autograd accepts, also of a tensor made under ``torch.inference_mode``."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", copy=True).contiguous()


@dataclass(frozen=True)
class Cache:
    """A folder of encoded tensors. With the folder None nothing is kept."""

    folder: Path | None

    def __post_init__(self) -> None:
        if self.folder is not None:
            _check_writable(self.folder)

    def recall(self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors under ``key``, made and kept if they are not there. ``kind`` begins the file's name."""
        if self.folder is None:
            return settled(make())
        name = digest(VERSION, kind, key)
        path = self.folder / f"{kind}-{name}.safetensors"
        tensors = _read(path, name)
        if tensors is None:
            tensors = settled(make())
            _write(path, name, tensors)
        return tensors


def settled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: settle(tensor) for name, tensor in tensors.items()}


def _check_writable(folder: Path) -> None:
    probe = folder / f".stylewright.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"Cannot write to the cache folder {folder}: {error.strerror}. Name another one, or none"
        ) from error


def _read(path: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors of a whole file of this name; None where there is none that can be trusted."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: settle(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        log.warning("%s is made again, its file is damaged: %s", path, error)
        return None
    if header.get("stylewright.cache") != name or header.get("stylewright.checksum") != digest_named(tensors):
        log.warning("%s is made again, its file is damaged or not ours", path)
        return None
    return tensors


def _write(path: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    header = {"stylewright.cache": name, "stylewright.checksum": digest_named(tensors)}
    try:
        write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, header))
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"Cannot write {path}: {error}. Make room there, or use another cache folder or none"
        ) from error
