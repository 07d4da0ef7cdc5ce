"""The file of a LoRA that stands for an adapter which cannot be merged into weights."""

import json
from dataclasses import replace

from ..adapters.approximation import Approximation
from .contents import AdapterFile, read_layers
from .keys import FAMILIES, layout_of
from .layers import Layer
from .metadata import LAYERS_KEY, LAYOUT_KEY, PREFIX, STYLE_KEY, build_metadata
from .styles import best_style, styled

APPROXIMATES_KEY = f"{PREFIX}approximates"  # what it stands for, and what is lost


def approximated_file(file: AdapterFile, found: Approximation) -> AdapterFile:
    """A LoRA's file in the place of ``file``: the same style, and what is lost in its metadata. In memory only."""
    assert file.about is not None, "an adapter of ours says what it is"
    about = replace(
        file.about, method="lora", rank=found.rank, alpha=None, options={}, routing={}, started_from=file.path.name
    )
    layers = {name: Layer("lora", layer.tensors) for name, layer in read_layers(found.state, about)[0].items()}
    style = best_style(about.family, layers, weights_known=False)
    written = styled(layers, style, about.family, unet_layers=about.unet_layers)
    kept = {key: value for key, value in file.header.items() if not key.startswith((PREFIX, "ss_", "modelspec."))}
    header = {**kept, **build_metadata(about), STYLE_KEY: style, LAYERS_KEY: json.dumps(list(layers))}
    header[APPROXIMATES_KEY] = f"{file.about.method}: {found.summary()}"
    if about.family in FAMILIES:
        header[LAYOUT_KEY] = layout_of(about.family, layers, about.unet_layers)
    return AdapterFile(file.path, header, about, layers, (), written.tensors)
