"""Tensors in parts on several processes, in a folder from which any number of processes takes its own.

torch.distributed.checkpoint, as safetensors: each process writes the parts that it has, and reads those that it needs,
also where there are more of them or fewer than wrote. One process alone reads whole tensors.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sharding import is_part, part_like

if TYPE_CHECKING:
    import torch.distributed as dist

MARK = "stylewright.part"  # key of the name that stands for a tensor taken out …
SIZE = "size"  # … and of its size
TOKEN = "token"  # of a folder, and in the state beside it: a number that tells whether they belong together


def taken_out(state: Any, place: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Nested state with a name for each of its tensors in parts; and these by their names."""
    if is_part(state):
        return {MARK: place, SIZE: list(state.shape)}, {place: state}
    if isinstance(state, Mapping):
        items = {key: taken_out(value, f"{place}/{key}") for key, value in state.items()}
        return {key: rest for key, (rest, _) in items.items()}, _joined(parts for _, parts in items.values())
    if isinstance(state, list | tuple):
        found = [taken_out(value, f"{place}/{number}") for number, value in enumerate(state)]
        return type(state)(rest for rest, _ in found), _joined(parts for _, parts in found)
    return state, {}


def put_back(state: Any, parts: Mapping[str, Tensor]) -> Any:
    """What :func:`taken_out` was given. KeyError for a tensor that is not among ``parts``."""
    if isinstance(state, Mapping):
        if state.keys() == {MARK, SIZE}:
            return parts[state[MARK]]
        return {key: put_back(value, parts) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(put_back(value, parts) for value in state)
    return state


def require_writing_parts() -> None:
    """ValueError for a torch that cannot write them as safetensors."""
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"torch {torch.__version__} cannot write what is in parts on several processes as safetensors: update it "
            "to 2.9 or newer, train an adapter instead of all weights, or leave FSDP out."
        ) from error


def save_parts(folder: Path, parts: Mapping[str, Tensor], token: int, words: "dist.ProcessGroup | None") -> None:
    """Writes each process's parts into ``folder``, which all of them see. OSError, in all, where one of them cannot."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    with _as_os_errors():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save({TOKEN: torch.tensor([token]), **parts}, storage_writer=writer, process_group=words)


def room_for_parts(folder: Path, state: Any, like: Tensor) -> dict[str, Tensor]:
    """Empty tensors for what is missing in ``state``: in parts as ``like`` is, or whole where it is.

    Waits for nobody. OSError for a folder that is missing, or that has not all of each tensor.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    if not folder.is_dir():
        raise FileNotFoundError("there is no such folder")
    about: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
    found = {TOKEN: torch.zeros(1, dtype=torch.int64)}
    for name, size in _sizes(state).items():
        stored = about.state_dict_metadata.get(name)
        if stored is None or list(stored.size) != size or _numbers(stored.chunks) != math.prod(size):
            files = sorted(path.name for path in folder.glob("*.safetensors"))
            raise OSError(f"{name} is not all there: it has {', '.join(files) or 'no file'}, and one is missing")
        dtype = stored.properties.dtype
        found[name] = part_like(like, size, dtype) if is_part(like) else torch.empty(size, dtype=dtype)
    return found


def _sizes(state: Any) -> dict[str, list[int]]:
    """Of all tensors that :func:`taken_out` took."""
    if isinstance(state, Mapping):
        if state.keys() == {MARK, SIZE}:
            return {state[MARK]: state[SIZE]}
        return {name: size for value in state.values() for name, size in _sizes(value).items()}
    if isinstance(state, list | tuple):
        return {name: size for value in state for name, size in _sizes(value).items()}
    return {}


def _numbers(chunks: Iterable[Any]) -> int:
    return sum(math.prod(chunk.sizes) for chunk in chunks)


def load_parts(folder: Path, found: dict[str, Tensor], token: int, words: "dist.ProcessGroup | None") -> None:
    """Fills :func:`room_for_parts`. OSError, in all processes, for a damaged folder, and for one of another state."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    alone = not any(map(is_part, found.values()))
    with _as_os_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process loads alone
        load(found, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=words, no_dist=alone)
    if found[TOKEN].item() != token:
        raise OSError("it is of another checkpoint")
    own = {name: part.to_local() if is_part(part) else part for name, part in found.items()}  # ty: ignore
    if bad := [name for name, tensor in own.items() if not bool(tensor.isfinite().all())]:
        raise OSError(f"{bad[0]} holds NaN or infinity, which no run writes")


def _joined(found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for parts in found for name, tensor in parts.items()}


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """The library's own is no Exception, and tells the others' in full."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        told = "; ".join(f"process {rank}: {failure}" for rank, (failure, _) in error.failures.items())
        raise OSError(told) from error
