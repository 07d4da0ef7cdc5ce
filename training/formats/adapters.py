"""Adapter files: saving what was trained, loading it to go on, converting between styles, saying what is inside."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.methods import AdapterConfig
from .contents import AdapterFile, read_adapter, read_layers
from .keys import FAMILIES, LAYOUTS, TEXT_ENCODER, UNET_LAYERS, layout_of
from .keys_transformers import TRANSFORMERS
from .layers import Layer, folded, kronecker_as_lora
from .layouts import at_one_rank, to_diffusers, to_native
from .metadata import LAYERS_KEY, LAYOUT_KEY, NORM_KEY, STYLE_KEY, AdapterMetadata, read_metadata
from .sharing import multiplied, shares
from .spelling import read_key, style_of, write_layer, write_name
from .state import write_atomically
from .styles import MERGED, Weights, best_style, has_dora, renormed, styled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as peft makes it: one method, rank and alpha for all layers, whatever the file had."""

    state: dict[str, Tensor]  # peft's names, ``<layer>.lora_A.weight``
    names: tuple[str, ...]  # of the layers
    layout: str  # of these names: "diffusers" or "native"
    family: str
    method: str
    rank: int
    alpha: float | None  # None for OFT, which has none
    about: AdapterMetadata | None  # None = another tool's file
    shared: bool = False  # whether the state is of bottlenecks that share

    @property
    def config(self) -> AdapterConfig:
        """What it takes to attach it; which layers is in ``names``."""
        return AdapterConfig(self.method, self.rank, self.alpha, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What the method has besides rank and alpha."""
        stated = dict(self.about.options) if self.about else {}
        if not self.shared:
            stated.pop("shared_bottleneck", None)
        return stated


@dataclass(frozen=True)
class AdapterReport:
    """What is in a file."""

    path: str
    format_version: int | None  # None = another tool's file
    family: str | None  # None = not recognised
    style: str | None
    layout: str | None  # None = mixed, or not recognised
    method: str
    ranks: tuple[int, ...]  # all that occur; of OFT the sides of the blocks
    alphas: tuple[float, ...]
    modules: int
    text_encoder_modules: int
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    style_phrase: str
    trigger: str
    one_step: str  # how a one-step student is called, "" for what is none
    unknown: tuple[str, ...]  # tensors that belong to no layer we understand
    metadata: Mapping[str, str]


def save_adapter(
    path: Path,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    style: str | None = None,  # None = the one that most tools read
    *,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,  # None = as trained
) -> None:
    """Writes a trained adapter.

    ``state``: peft's names, on diffusers or native layers. ``metadata``: from :func:`.metadata.build_metadata`.
    ``weights`` gives the base model's weight of a layer. Without it, OFT can only be kept in peft's style, and DoRA
    with magnitudes that ComfyUI's own loader applies with a slight error.
    """
    path = Path(path)
    about = read_metadata(metadata, f"the adapter for {path}")
    if about is None:
        raise ValueError(f"the metadata for {path} name no family, method and rank: make them with build_metadata")
    layers, unknown = read_layers(state, about)
    if unknown or not layers:
        shown = ", ".join(unknown[:3]) or "nothing"
        raise ValueError(f"the adapter for {path} has tensors that no adapter method has: {shown}")
    layers = {name: Layer(layer.method, layer.tensors, about.scale) for name, layer in layers.items()}
    style = style or best_style(about.family, layers, weights_known=weights is not None)
    if weights is None and style == "comfyui" and has_dora(layers):
        logger.warning("%s: without the base model's weights ComfyUI applies this DoRA with a slight error", path)
    written = styled(layers, style, about.family, weights=weights, unet_layers=about.unet_layers)
    if shares(state):
        spelled = {write_name(style, about.family, "", name): value for name, value in state.items()}
        written = replace(written, tensors=multiplied(spelled, about.scale))
    header = {**metadata, STYLE_KEY: style, LAYERS_KEY: json.dumps(list(layers))}
    if about.family in FAMILIES:
        header[LAYOUT_KEY] = layout_of(about.family, layers, about.unet_layers)
    _write(path, written.tensors, header | ({NORM_KEY: written.norm} if written.norm else {}), dtype)


def load_adapter(
    path: Path,
    layout: str | None = None,  # None = as it was trained, or as the file has it
    *,
    family: str | None = None,  # None = as the file says or tells
    weights: Weights | None = None,  # needed for a DoRA written for ComfyUI
    text_encoders: bool = False,  # whether to keep their layers; else they are left out, with a warning
) -> LoadedAdapter:
    """Reads an adapter of any style for training it further or drawing with it.

    A LoKr comes back as a LoRA where it was trained in another layout or with another tool, for peft alone decides
    how layers are factored. ValueError names a file that is no adapter, or that cannot be had in this layout.
    """
    return loaded_from(read_adapter(path), layout, family=family, weights=weights, text_encoders=text_encoders)


def loaded_from(
    file: AdapterFile,
    layout: str | None = None,
    *,
    family: str | None = None,
    weights: Weights | None = None,
    text_encoders: bool = False,
) -> LoadedAdapter:
    """The same of a file that is open already."""
    path = file.path
    _refuse_unknown(file)
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    family = family or file.family or ""
    layers = {name: layer for name, layer in file.layers.items() if text_encoders or not name.startswith(TEXT_ENCODER)}
    if left_out := len(file.layers) - len(layers):
        logger.warning("%s: left out %d layers of text encoders", path, left_out)
    trained = file.header.get(LAYOUT_KEY)
    layout = layout or trained
    if not file.about or (layout != trained and family in TRANSFORMERS):
        layers = {n: kronecker_as_lora(layer) if layer.method == "lokr" else layer for n, layer in layers.items()}
    if layout and family in FAMILIES:
        layers = _in_layout(file, layers, family, layout)
    elif layout != trained:
        raise ValueError(f"{path}: its layers cannot be renamed, because its family is not recognised: give the family")
    layers = renormed(layers, file.header.get(NORM_KEY, MERGED), MERGED, weights)
    if family in FAMILIES:
        layout = layout_of(family, layers, _unet_layers(file))
    loaded = _as_peft(file.about, layers, family, layout or "native")
    if file.about and shares(file.tensors) and layers.keys() == file.layers.keys():
        return _sharing(loaded, file)
    return loaded


def convert_adapter(
    source: Path,
    target: Path,
    style: str,
    *,
    family: str | None = None,  # None = as the file says or tells
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes an adapter's file in another style, with the same effect and metadata. ValueError where that cannot be."""
    file = read_adapter(source)
    _refuse_unknown(file)
    family = family or file.family
    if family not in FAMILIES and style != style_of(file.tensors):
        raise ValueError(
            f"{source}: its family is not recognised: give one of {', '.join(FAMILIES)}"
            if family is None
            else f"{source}: the names of {family!r} models are known in one style only, so it cannot be converted"
        )
    norm = file.header.get(NORM_KEY, MERGED)
    layers = file.layers
    if file.about and family in FAMILIES and LAYOUT_KEY in file.header:
        layers = _in_layout(file, layers, family, file.header[LAYOUT_KEY])  # as trained: what ``weights`` speaks of
        layers = {name: folded(layer, file.about.scale) for name, layer in layers.items()}
    written = styled(layers, style, family or "", norm=norm, weights=weights, unet_layers=_unet_layers(file))
    header = {**file.header, STYLE_KEY: style} if file.about else dict(file.header)
    _write(Path(target), written.tensors, header | ({NORM_KEY: written.norm} if written.norm else {}), dtype)


def inspect_adapter(path: Path) -> AdapterReport:
    """What is in an adapter's file, of any style and tool."""
    return report_of(read_adapter(path))


def report_of(file: AdapterFile) -> AdapterReport:
    """The same of a file that is open already, or of which only the outline was read."""
    layers, about = file.layers, file.about
    method = Counter(layer.method for layer in layers.values()).most_common(1)[0][0]
    ranked = [layer for layer in layers.values() if layer.rank is not None]
    return AdapterReport(
        path=str(file.path),
        format_version=int(file.header["stylewright.format_version"]) if about else None,
        family=file.family,
        style=file.header.get(STYLE_KEY) or style_of(file.tensors),
        layout=_layout(file),
        method=about.method if about else "dora" if has_dora(layers) else method,
        ranks=tuple(sorted({layer.rank or 0 for layer in ranked})),
        alphas=tuple(sorted({round(layer.scale * (layer.rank or 0), 6) for layer in ranked if layer.method != "oft"})),
        modules=len(layers),
        text_encoder_modules=sum(name.startswith(TEXT_ENCODER) for name in layers),
        tensors=len(file.tensors),
        parameters=sum(tensor.numel() for tensor in file.tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()})),
        style_phrase=about.style_phrase if about else "",
        trigger=about.trigger if about else file.header.get("modelspec.trigger_phrase", ""),
        one_step=about.call if about else "",
        unknown=file.unknown,
        metadata=file.header,
    )


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Alphas stay float32: they are no weights."""
    kept = {
        key: value.detach().to("cpu", None if key.endswith(".alpha") else dtype, copy=True).contiguous()
        for key, value in tensors.items()
    }
    write_atomically(path, lambda temporary: save_file(kept, temporary, dict(header)))


def _in_layout(file: AdapterFile, layers: Mapping[str, Layer], family: str, layout: str) -> dict[str, Layer]:
    if layout == "native":
        return to_native(layers, family, _unet_layers(file))
    trained = json.loads(file.header.get(LAYERS_KEY, "[]"))
    return to_diffusers(layers, family, _unet_layers(file), trained)


def _unet_layers(file: AdapterFile) -> int:
    return file.about.unet_layers if file.about else UNET_LAYERS


def _layout(file: AdapterFile) -> str | None:
    try:
        return layout_of(file.family or "", file.layers, _unet_layers(file))
    except ValueError:
        return None


def _refuse_unknown(file: AdapterFile) -> None:
    if file.unknown:
        shown = ", ".join(file.unknown[:5])
        raise ValueError(f"{file.path} has {len(file.unknown)} tensors that we do not understand, for example {shown}")


def _sharing(loaded: LoadedAdapter, file: AdapterFile) -> LoadedAdapter:
    """The same with what its layers share as it was trained."""
    assert file.about is not None, "only we write such files"
    about, found = file.about, {read_key(key): value for key, value in file.tensors.items()}
    state = {f"{key[0]}.{key[1]}": value.contiguous() for key, value in found.items() if key}
    alpha = float(about.scale * about.rank)
    return replace(loaded, state=multiplied(state, 1 / about.scale), rank=about.rank, alpha=alpha, shared=True)


def _as_peft(about: AdapterMetadata | None, layers: Mapping[str, Layer], family: str, layout: str) -> LoadedAdapter:
    """Layers as peft makes them: at one rank and one scale."""
    methods = {"dora" if "magnitude" in layer.tensors else layer.method for layer in layers.values()}
    if len(methods) != 1:
        raise ValueError(f"the adapter mixes the methods {', '.join(sorted(methods))}: expected one")
    method, layers = methods.pop(), at_one_rank(layers)
    scales = {layer.scale for layer in layers.values()}
    rank = max((layer.rank or 1 for layer in layers.values()), default=1)
    if about and method == "lokr":
        rank = about.rank  # it says which factors are products, and may appear in none
    scale = about.scale if about else scales.pop() if len(scales) == 1 else 1.0
    if about and rank == about.rank and (method == about.method or about.method == "rslora"):
        method, alpha = about.method, about.alpha if about.alpha is not None else float(rank)
    else:
        alpha = scale * rank
    state = {}
    for name, layer in layers.items():
        for end, value in write_layer("peft", folded(layer, scale)).items():
            state[f"{name}.{end}"] = value.contiguous()
    return LoadedAdapter(
        state, tuple(layers), layout, family, method, rank, None if method == "oft" else float(alpha), about
    )
