"""A network with all weights of another, for the time of a ``with`` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..adapters.targets import exactly
from ..adapters.whole import merge_into
from ..denoiser import Denoiser
from ..formats.adapters import LoadedAdapter
from ..formats.contents import read_about
from ..formats.metadata import FULL, AdapterMetadata
from ..formats.starting import WholeStart
from ..formats.whole import load_whole
from .loading import load_host


@contextmanager
def with_weights(denoiser: Denoiser, path: Path, about: AdapterMetadata) -> Iterator[None]:
    """Inside, the network has the weights of this file, in its own type and place.

    ValueError, and nothing changed, for weights of another family, or of other shapes.
    """
    if about.family != denoiser.family:
        raise ValueError(f"{path} is a network of the family {about.family}, and the model of {denoiser.family}")
    state, own = load_whole(path), dict(denoiser.module.named_parameters())
    for name, parameter in own.items():
        if name not in state or state[name].shape != parameter.shape:
            found = tuple(state[name].shape) if name in state else "no such tensor"
            raise ValueError(f"{path} has {found} for {name}, and the model {tuple(parameter.shape)}: another model's")
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = state[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]


def whole_start(model: str, components: str | None, denoiser: Denoiser) -> WholeStart:
    """All weights of another model of the network's kind, or of a student's file, for a student to begin with.

    ``components``: of a model that is one file. ValueError for one of another kind.
    """
    path = Path(model).expanduser()
    about = read_about(path) if path.suffix == ".safetensors" and path.is_file() else None
    if about is not None and about.method == FULL:
        kind, state, one_step = (about.family, about.process, about.prediction), load_whole(path), about.one_step
    else:
        other = load_host(model, components=components if path.is_file() else None).denoiser
        kind, state, one_step = (other.family, other.process, other.prediction), other.module.state_dict(), {}
    if kind != (own := (denoiser.family, denoiser.process, denoiser.prediction)):
        raise ValueError(
            f"{model} is of the kind {', '.join(kind)}, and the teacher of {', '.join(own)}: a student begins with a "
            "model that is built and predicts as its teacher"
        )
    return WholeStart(path.name, state, one_step)


def merged_weights(denoiser: Denoiser, loaded: LoadedAdapter, name: str) -> dict[str, Tensor]:
    """All weights of the network with the change of an adapter merged into them, which is left in it.

    ``name``: of the adapter's file, for messages. ValueError for one that is no change of weights, or of a network
    that is built in another way.
    """
    known = {each for each, _ in denoiser.module.named_modules()}
    if strangers := [layer for layer in loaded.names if layer not in known]:
        raise ValueError(f"{name} adapts the layer {strangers[0]}, which this model does not have: it is of another")
    config = replace(loaded.config, targets=exactly(loaded.names))
    merge_into(denoiser.module, loaded.state, config, denoiser.family, name)
    return denoiser.module.state_dict()
