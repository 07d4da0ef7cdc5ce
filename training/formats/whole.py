"""Files of whole networks, as a full fine-tuning leaves them: diffusers' names, and metadata as of an adapter's file.

ComfyUI's Load Diffusion Model and diffusers read them as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from safetensors.torch import save_file
from torch import Tensor

from .contents import outlines, read_about
from .metadata import FULL, PREFIX, VERSION_KEY, AdapterMetadata, build_metadata, read_metadata
from .state import opened, write_atomically

EXPECTED = "a student with all of its weights"
_OF_ADAPTERS = ("ss_", f"{PREFIX}rank", f"{PREFIX}targets", "modelspec.architecture")


@dataclass(frozen=True)
class WholeReport:
    """What is in such a file."""

    path: str
    format_version: int
    family: str
    method: str
    one_step: str  # how a student is called, "" for what is none
    title: str
    base_model: str
    style_phrase: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    metadata: Mapping[str, str]


def save_whole(
    path: Path,
    state: Mapping[str, Tensor],
    about: AdapterMetadata,
    said: Mapping[str, str] = MappingProxyType({}),  # further metadata of ours
) -> None:
    """Writes a network's tensors under its own names."""
    header = {key: value for key, value in build_metadata(about).items() if not key.startswith(_OF_ADAPTERS)}
    kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    header |= {f"{PREFIX}{name}": words for name, words in said.items()} | {f"{PREFIX}rank": "1"}
    write_atomically(path, lambda temporary: save_file(kept, temporary, header))


def is_whole(path: Path) -> bool:
    """Whether the file is one of ours with all weights of a network. ValueError where it is no safetensors file."""
    about = read_about(path)
    return about is not None and about.method == FULL


def load_whole(path: Path) -> dict[str, Tensor]:
    with opened(path, EXPECTED) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping


def inspect_whole(path: Path) -> WholeReport:
    """What is in the file, of which only the header is read. ValueError for any other one."""
    with opened(path, EXPECTED) as file:
        header, tensors = dict(file.metadata() or {}), outlines(file)
    about = read_metadata(header, str(path))
    if about is None or about.method != FULL:
        raise ValueError(f"{path} does not say that it is {EXPECTED}")
    return WholeReport(
        path=str(path),
        format_version=int(header[VERSION_KEY]),
        family=about.family,
        method=about.method,
        one_step=about.call,
        title=about.title,
        base_model=about.base_model,
        style_phrase=about.style_phrase,
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        metadata=header,
    )
