"""An adapter's layers as the tensors of a file in one style, and which style a family is best kept in."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.methods import UNMERGEABLE
from .keys import FAMILIES, UNET_LAYERS, native_place
from .layers import Layer, folded, product
from .layouts import to_diffusers, to_native
from .rotations import to_glora
from .spelling import STYLES, WITHOUT_ALPHA, write_layer, write_name

Weights = Callable[[str], Tensor]  # name of a layer, as it was trained -> the model's weight (out, in[, k, k])

# What most tools read. diffusers has no reader for SD3's and PixArt's in kohya's spelling.
BEST_STYLES = {"flux": "kohya", "sd3": "diffusers", "sdxl": "kohya", "sd15": "kohya", "pixart": "diffusers"}
FLUX_HIDDEN = 3072  # diffusers' reader of kohya's spelling knows FLUX.1's own size only
MERGED, BASE = "merged", "base"  # norms that DoRA's magnitudes divide by


@dataclass(frozen=True)
class Styled:
    """The tensors of a file by key, and the norm that its DoRA magnitudes divide by (None = no DoRA)."""

    tensors: dict[str, Tensor]
    norm: str | None


def best_style(family: str, layers: Mapping[str, Layer], *, weights_known: bool) -> str:
    """The style that the most tools read such an adapter in."""
    methods = {layer.method for layer in layers.values()}
    if methods & set(UNMERGEABLE):
        return "peft"
    if "oft" in methods and not weights_known:
        return "peft"
    if methods != {"lora"} or has_dora(layers):
        return "kohya" if family in ("flux", "sdxl", "sd15") and not has_dora(layers) else "comfyui"
    style = BEST_STYLES.get(family, "comfyui")
    return "diffusers" if family == "flux" and _has_another_size(layers) else style


def has_dora(layers: Mapping[str, Layer]) -> bool:
    return any("magnitude" in layer.tensors for layer in layers.values())


def styled(
    layers: Mapping[str, Layer],
    style: str,
    family: str,
    *,
    norm: str = MERGED,  # that the magnitudes divide by now
    weights: Weights | None = None,  # of the base model: for OFT outside of peft, and DoRA as ComfyUI computes it
    unet_layers: int = UNET_LAYERS,
) -> Styled:
    """Layers in any layout as the tensors of a file. ValueError where the style cannot hold them."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: expected one of {', '.join(STYLES)}")
    if style == "diffusers" and any(layer.method == "oft" for layer in layers.values()):
        raise ValueError("diffusers reads no OFT: use the style peft, or comfyui with the base model at hand")
    own = next((layer.method for layer in layers.values() if layer.method in UNMERGEABLE), None)
    if own and style != "peft":
        raise ValueError(f"{own} is known to no other tool, so that its files have one style: use peft")
    wanted = BASE if style == "comfyui" and (weights or norm == BASE) else MERGED
    layers = renormed(layers, norm, wanted, weights)
    if style in ("kohya", "comfyui"):
        layers = {name: _product_form(name, layer, style, weights) for name, layer in layers.items()}
    if family in FAMILIES and style != "peft":
        native = style == "comfyui" or (style == "kohya" and family != "sd15")
        layers = (to_native if native else to_diffusers)(layers, family, unet_layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        # Without a rank there is no alpha to say the scale with.
        layer = folded(layer) if style in WITHOUT_ALPHA or layer.rank is None else layer
        spelled = write_name(style, family, _layout(family, name, style, unet_layers), name)
        tensors |= {f"{spelled}.{end}": value for end, value in write_layer(style, layer).items()}
    return Styled(tensors, wanted if has_dora(layers) else None)


@torch.no_grad()
def renormed(layers: Mapping[str, Layer], norm: str, wanted: str, weights: Weights | None) -> dict[str, Layer]:
    """DoRA's magnitudes for the other norm.

    The paper's weight is m (W + BA) / |W + BA|, by rows, and so is peft's (arXiv 2402.09353, Eq. 5). ComfyUI's
    (0.14 to 0.33) is m (W + BA) / |W|: its magnitudes have to be |W| / |W + BA| times as large.
    """
    if norm == wanted or not has_dora(layers):
        return dict(layers)
    if weights is None:
        raise ValueError(
            "this DoRA is written for ComfyUI's arithmetic, and only with the base model's weights can it be had in "
            "another: give them, or save it from training in another style"
        )
    changed = {}
    for name, layer in layers.items():
        if "magnitude" in layer.tensors:
            weight = weights(name).flatten(1).float()
            ratio = weight.norm(dim=1) / (weight + product(layer).to(weight)).norm(dim=1)
            factor = ratio if wanted == BASE else 1 / ratio
            magnitude = layer.tensors["magnitude"] * factor.to(layer.tensors["magnitude"])
            layer = Layer(layer.method, {**layer.tensors, "magnitude": magnitude}, layer.scale)
        changed[name] = layer
    return changed


def _product_form(name: str, layer: Layer, style: str, weights: Weights | None) -> Layer:
    """OFT in the form that ComfyUI applies; any other layer as it is."""
    if layer.method != "oft":
        return layer
    if weights is None:
        raise ValueError(f"OFT can only be written in the style {style} with the base model at hand: use style peft")
    weight = weights(name)
    if weight[0].numel() != weight.shape[1]:
        raise ValueError(f"OFT of the convolution {name} can only be written in the style peft")
    return to_glora(layer, weight.shape[0])


def _layout(family: str, name: str, style: str, unet_layers: int) -> str:
    """The layout of a name after translation: the style's, but for parts that could not be fused."""
    if family not in FAMILIES:
        return "diffusers" if style == "diffusers" else "native"
    parts = native_place(family, name, unet_layers)
    return "diffusers" if style == "diffusers" or (parts and parts.parts > 1) else "native"


def _has_another_size(layers: Mapping[str, Layer]) -> bool:
    """Whether this FLUX is not as wide as FLUX.1."""
    reads_hidden = re.compile(r"single_blocks\.\d+\.linear1|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)")
    return any(reads_hidden.fullmatch(name) and layer.inputs != FLUX_HIDDEN for name, layer in layers.items())
