"""Files of whole networks, as a full fine-tuning leaves them: diffusers' names, and metadata as of an adapter's file.

ComfyUI's Load Diffusion Model and diffusers read them as they are.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .contents import read_about
from .metadata import PREFIX, AdapterMetadata, build_metadata
from .state import opened, write_atomically

METHOD = "full"  # in the metadata, in the place of an adapter's method
_OF_ADAPTERS = ("ss_", f"{PREFIX}rank", f"{PREFIX}targets", "modelspec.architecture")


def save_whole(path: Path, state: Mapping[str, Tensor], about: AdapterMetadata) -> None:
    """Writes a network's tensors under its own names."""
    header = {key: value for key, value in build_metadata(about).items() if not key.startswith(_OF_ADAPTERS)}
    kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    write_atomically(path, lambda temporary: save_file(kept, temporary, {**header, f"{PREFIX}rank": "1"}))


def is_whole(path: Path) -> bool:
    """Whether the file is one of ours with all weights of a network. ValueError where it is no safetensors file."""
    about = read_about(path)
    return about is not None and about.method == METHOD


def load_whole(path: Path) -> dict[str, Tensor]:
    with opened(path, "a student with all of its weights") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
