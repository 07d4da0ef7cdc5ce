"""Which layers an adapter sits on: presets by family, and patterns for everything else.

A pattern is a regular expression for the end of a module's name, from a dot on: ``to_q`` finds every ``….to_q``.
Every pattern of a preset knows both layouts of a family, diffusers' and the original one that ComfyUI keeps, and
has to match in whichever it meets.
"""

import re
from collections.abc import Iterable

from torch import nn

from ..frozen import is_multiplying

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)

# Parts of names: of layers that steer or embed instead of mixing features, and of convolutions.
_STEERING = r"\w*(?:norm|embed|adaln|modulation)\w*|\w*_mod|mod|\w*_emb|emb_layers|time_emb_proj"
_CONVOLUTION = r"\w*conv\w*|in_layers|out_layers|skip_connection|op"
# The layers below a numbered block but those; a number right below a number is the first convolution of a UNet.
_GENERIC = rf"\A(?i:(?!(?:.*\.)?(?:{_STEERING}|{_CONVOLUTION})(?:\.|\Z)))(?!.*\.\d+\.\d+\Z)(?:.*\.)?\d+\..+"

_TO_QKV_OUT = r"to_(?:q|k|v|out\.0)"
_UNET_ATTENTION = rf"transformer_blocks\.\d+\.attn[12]\.{_TO_QKV_OUT}"
_PIXART_SELF = rf"transformer_blocks\.\d+\.attn1\.{_TO_QKV_OUT}|blocks\.\d+\.attn\.(?:qkv|proj)"
_PIXART_CROSS = rf"transformer_blocks\.\d+\.attn2\.{_TO_QKV_OUT}|blocks\.\d+\.cross_attn\.(?:q_linear|kv_linear|proj)"
_FLUX_IMAGE = rf"transformer_blocks\.\d+\.attn\.{_TO_QKV_OUT}|double_blocks\.\d+\.img_attn\.(?:qkv|proj)"
_FLUX_TEXT = r"transformer_blocks\.\d+\.attn\.add_[qkv]_proj|double_blocks\.\d+\.txt_attn\.qkv"
_FLUX_TEXT_OUT = r"transformer_blocks\.\d+\.attn\.to_add_out|double_blocks\.\d+\.txt_attn\.proj"
# The original layout fuses q, k, v and the MLP's first layer into linear1, the attention's and the MLP's last into
# linear2.
_FLUX_SINGLE_QKV = r"single_transformer_blocks\.\d+\.attn\.to_[qkv]|single_blocks\.\d+\.linear1"
_FLUX_SINGLE_IN = r"single_transformer_blocks\.\d+\.(?:attn\.to_[qkv]|proj_mlp)|single_blocks\.\d+\.linear1"
_FLUX_SINGLE_OUT = r"single_transformer_blocks\.\d+\.proj_out|single_blocks\.\d+\.linear2"
_SD3_IMAGE = rf"transformer_blocks\.\d+\.attn2?\.{_TO_QKV_OUT}|joint_blocks\.\d+\.x_block\.attn2?\.(?:qkv|proj)"
_SD3_TEXT = (
    r"transformer_blocks\.\d+\.attn\.(?:add_[qkv]_proj|to_add_out)"
    r"|joint_blocks\.\d+\.context_block\.attn\.(?:qkv|proj)"
)

OTHER = "other"

# family -> preset -> patterns. Every family has "style", the default, and "all".
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        # Style-Friendly SNR Sampler, arXiv 2411.14793v3, Fig. S3. The text stream's output projection is not in it,
        # and neither is the model's last proj_out, which peft's matching of "proj_out" would catch.
        "style": (_FLUX_IMAGE, _FLUX_TEXT, _FLUX_SINGLE_IN, _FLUX_SINGLE_OUT),
        "attention": (_FLUX_IMAGE, _FLUX_TEXT, _FLUX_TEXT_OUT, _FLUX_SINGLE_QKV),
        "image-attention": (_FLUX_IMAGE,),
        "all": (_GENERIC,),
    },
    "sd3": {
        "style": (_SD3_IMAGE, _SD3_TEXT),  # the same figure, for SD3.5
        "attention": (_SD3_IMAGE, _SD3_TEXT),
        "image-attention": (_SD3_IMAGE,),  # costs 0.027 DINO there (table S3)
        "all": (_GENERIC,),
    },
    "sdxl": {
        "style": (_UNET_ATTENTION,),
        "attention": (_UNET_ATTENTION,),
        "cross-attention": (rf"transformer_blocks\.\d+\.attn2\.{_TO_QKV_OUT}",),
        "all": (_GENERIC,),
    },
    "pixart": {
        "style": (_PIXART_SELF, _PIXART_CROSS),
        "attention": (_PIXART_SELF, _PIXART_CROSS),
        "cross-attention": (_PIXART_CROSS,),
        "all": (_GENERIC,),
    },
    OTHER: {"style": (_GENERIC,), "all": (_GENERIC,)},
}
TARGETS["sd15"] = TARGETS["sdxl"]


def target_patterns(family: str, targets: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns of a preset, or the patterns given. An unknown family has the generic presets."""
    if not isinstance(targets, str):
        return tuple(targets)
    presets = TARGETS.get(family, TARGETS[OTHER])
    if targets not in presets:
        raise ValueError(
            f"targets {targets!r} is no preset of the family {family!r}: choose one of {', '.join(presets)}, "
            "or give a list of patterns for names of layers"
        )
    return presets[targets]


def resolve_targets(module: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the layers that the patterns match, in the module's order.

    ValueError if a pattern matches nothing: the message lists the layers that exist.
    """
    layers = {name: layer for name, layer in module.named_modules() if name and _multiplies(layer)}
    found: set[str] = set()
    patterns = tuple(patterns)
    if not patterns:
        raise ValueError(f"no targets were given: {_what_exists(layers)}")
    for pattern in patterns:
        expression = _compiled(pattern)
        matched = {name for name in layers if expression.fullmatch(name)}
        if not matched:
            raise ValueError(f"the target pattern {pattern!r} matches no layer of this model: {_what_exists(layers)}")
        found |= matched
    return [name for name in layers if name in found]


def grouped(names: Iterable[str]) -> list[str]:
    """Names with their numbers as stars, each once: ``double_blocks.*.img_attn.qkv``."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise ValueError(f"the target pattern {pattern!r} is no regular expression: {error}") from error


def _multiplies(layer: nn.Module) -> bool:
    """Linear and convolution layers, and what stands in for them when weights are quantised."""
    return isinstance(layer, ADAPTABLE) or (is_multiplying(layer) and not isinstance(layer, nn.Conv3d))


def _what_exists(layers: Iterable[str]) -> str:
    return "it has " + (", ".join(grouped(layers)) or "no linear or convolution layers")
