"""A network with all weights of another, for the time of a ``with`` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..denoiser import Denoiser
from ..formats.metadata import AdapterMetadata
from ..formats.whole import load_whole


@contextmanager
def with_weights(denoiser: Denoiser, path: Path, about: AdapterMetadata) -> Iterator[None]:
    """Inside, the network has the weights of this file, in its own type and place.

    ValueError, and nothing changed, for weights of another family, or of other shapes.
    """
    if about.family != denoiser.family:
        raise ValueError(f"{path} is a network of the family {about.family}, and the model is {denoiser.family}")
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
