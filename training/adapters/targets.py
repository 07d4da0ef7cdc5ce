"""Which layers an adapter sits on: presets by family, and patterns for everything else.

A pattern is a regular expression for the end of a module's name, from a dot on: ``to_q`` finds every ``….to_q``.
Every pattern of a preset knows both layouts of a family, diffusers' and the original one that ComfyUI keeps, and
has to match in whichever it meets. Families that we meet in ComfyUI alone have its layout.
"""

import re
from collections.abc import Iterable

from torch import nn

from ..frozen import is_multiplying
from .keys_values import KV_BOTH, KV_TEXT, SEPARATE, SINGLE, STACKED

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)

# Parts of names: of layers that steer or embed instead of mixing features, of convolutions, and of what only sees
# pictures that a prompt may refer to.
_STEERING = r"\w*(?:norm|embed|adaln|modulation|guidance)\w*|\w*_mod|mod(?:_?\w{1,2})?|\w*_emb|emb_layers|time_emb_proj"
_CONVOLUTION = r"\w*conv\w*|in_layers|out_layers|skip_connection|op"
_REFERENCES = r"ref_image_refiner|visual"
# The layers below a numbered block but those; a number right below a number is the first convolution of a UNet.
_MIXING = rf"(?i:(?!(?:.*\.)?(?:{_STEERING}|{_CONVOLUTION}|{_REFERENCES})(?:\.|\Z)))(?!.*\.\d+\.\d+\Z)(?:.*\.)?\d+\..+"


def _mixing(*, under: str = "", of: str = "", ending: str = "") -> str:
    """These layers, where names begin with ``under``, have a part ``of`` before their end, and end so."""
    begins, has = rf"\A(?={under})" * bool(under), rf"\A(?=(?:.*\.)?(?:{of})\.)" * bool(of)
    return begins + has + rf"\A(?=(?:.*\.)?(?:{ending})\Z)" * bool(ending) + rf"\A{_MIXING}"


_GENERIC = _mixing()
_ATTENTION_PARTS = r"\w*attn\w*|\w*attention\w*"
_KV = rf"{SEPARATE}|{STACKED}"

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


def _kv(text: str | None = None, both: str = _mixing(of=_ATTENTION_PARTS, ending=_KV)) -> dict[str, tuple[str, ...]]:
    """Keys and values: where the picture meets the text, and everywhere. ``text`` None = they share their layers."""
    return {KV_TEXT: (text or both,), KV_BOTH: (both,)}


def _crossing(of: str) -> dict[str, tuple[str, ...]]:
    """The same of a family with layers of cross-attention, whose names have a part ``of``."""
    return {"cross-attention": (_mixing(of=of),), **_kv(_mixing(of=of, ending=_KV))}


_FLUX_KV_TEXT = r"transformer_blocks\.\d+\.attn\.add_[kv]_proj|double_blocks\.\d+\.txt_attn\.qkv"
_FLUX_KV = (
    rf"(?:single_)?transformer_blocks\.\d+\.attn\.to_[kv]|{_FLUX_KV_TEXT}"
    rf"|double_blocks\.\d+\.img_attn\.qkv|{SINGLE}"
)
_SD3_KV_TEXT = r"transformer_blocks\.\d+\.attn\.add_[kv]_proj|joint_blocks\.\d+\.context_block\.attn\.qkv"
_SD3_KV = rf"transformer_blocks\.\d+\.attn2?\.to_[kv]|{_SD3_KV_TEXT}|joint_blocks\.\d+\.x_block\.attn2?\.qkv"

# family -> preset -> patterns. Every family has "style", the default, and "all".
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        # Style-Friendly SNR Sampler, arXiv 2411.14793v3, Fig. S3. The text stream's output projection is not in it,
        # and neither is the model's last proj_out, which peft's matching of "proj_out" would catch.
        "style": (_FLUX_IMAGE, _FLUX_TEXT, _FLUX_SINGLE_IN, _FLUX_SINGLE_OUT),
        "attention": (_FLUX_IMAGE, _FLUX_TEXT, _FLUX_TEXT_OUT, _FLUX_SINGLE_QKV),
        "image-attention": (_FLUX_IMAGE,),
        **_kv(_FLUX_KV_TEXT, _FLUX_KV),
        "all": (_GENERIC,),
    },
    "sd3": {
        "style": (_SD3_IMAGE, _SD3_TEXT),  # the same figure, for SD3.5
        "attention": (_SD3_IMAGE, _SD3_TEXT),
        "image-attention": (_SD3_IMAGE,),  # costs 0.027 DINO there (table S3)
        **_kv(_SD3_KV_TEXT, _SD3_KV),
        "all": (_GENERIC,),
    },
    "sdxl": {
        "style": (_UNET_ATTENTION,),
        "attention": (_UNET_ATTENTION,),
        "cross-attention": (rf"transformer_blocks\.\d+\.attn2\.{_TO_QKV_OUT}",),
        **_kv(r"transformer_blocks\.\d+\.attn2\.to_[kv]", r"transformer_blocks\.\d+\.attn[12]\.to_[kv]"),
        "all": (_GENERIC,),
    },
    "pixart": {
        "style": (_PIXART_SELF, _PIXART_CROSS),
        "attention": (_PIXART_SELF, _PIXART_CROSS),
        "cross-attention": (_PIXART_CROSS,),
        **_kv(
            r"transformer_blocks\.\d+\.attn2\.to_[kv]|blocks\.\d+\.cross_attn\.kv_linear",
            r"transformer_blocks\.\d+\.attn[12]\.to_[kv]|blocks\.\d+\.(?:attn\.qkv|cross_attn\.kv_linear)",
        ),
        "all": (_GENERIC,),
    },
    # Elsewhere trainers agree on every layer of the network's own blocks, attention and MLP alike.
    OTHER: {"style": (_GENERIC,), "attention": (_mixing(of=_ATTENTION_PARTS),), **_kv(), "all": (_GENERIC,)},
}


def _own(under: str, **more: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Presets of a family that also numbers blocks of a text encoder: its own are those whose names begin so."""
    return {
        "style": (_mixing(under=under),),
        "attention": (_mixing(under=under, of=_ATTENTION_PARTS),),
        **_kv(both=_mixing(under=under, of=_ATTENTION_PARTS, ending=_KV)),
        **more,
        "all": (_GENERIC,),
    }


_CROSSING = {**TARGETS[OTHER], **_crossing(r"attn2|cross_attn|cross_attention")}
# Two streams, of picture and text, that meet in attention only.
_TWO_STREAMS = {
    **TARGETS[OTHER],
    "image-attention": (rf"transformer_blocks\.\d+\.attn\.(?:{_TO_QKV_OUT}|img_qkv)",),
    **_kv(r"transformer_blocks\.\d+\.attn\.(?:add_[kv]_proj|txt_qkv)"),
}
TARGETS |= dict.fromkeys(("sd15", "sd21", "sdxl-refiner"), TARGETS["sdxl"])
# FLUX's architecture and names of layers. HunyuanVideo's text refiner is in "all" only.
TARGETS |= dict.fromkeys(("flux2", "chroma", "chroma-radiance", "longcat-image"), TARGETS["flux"])
TARGETS |= dict.fromkeys(("hunyuan-video", "hunyuan-video15", "hunyuan-image21"), TARGETS["flux"])
TARGETS |= dict.fromkeys(("qwen-image", "mage-flow", "lens"), _TWO_STREAMS)
TARGETS |= dict.fromkeys(("wan21", "wan22", "ltxv", "hunyuan-dit", "cosmos-predict2"), _CROSSING)
TARGETS |= dict.fromkeys(("kandinsky5", "kandinsky5-image"), _CROSSING)
TARGETS |= dict.fromkeys(("lumina2", "z-image", "z-image-pixel"), _own(r"layers\."))
TARGETS |= {
    "anima": _own(
        r"blocks\.",
        **{
            "cross-attention": (_mixing(under=r"blocks\.", of="cross_attn"),),
            KV_TEXT: (_mixing(under=r"blocks\.", of="cross_attn", ending=_KV),),
        },
    ),
    "krea2": _own(r"blocks\."),
    # Of its experts each sees a few of a picture's tokens, and many none.
    "hidream": {
        **_own(r"\w+_stream_blocks\."),
        "style": (_mixing(of=r"attn1|shared_experts|ff_t"),),
        KV_TEXT: (_mixing(ending=r"to_[kv]_t"),),
    },
    "hidream-o1": _own(r"language_model\."),
    "cosmos": {
        **TARGETS[OTHER],
        "cross-attention": (r"blocks\.1\.block\.attn\.to_(?:q|k|v|out)\.0",),
        KV_TEXT: (r"blocks\.1\.block\.attn\.to_[kv]\.0",),
    },
    "cogvideox": {
        **TARGETS[OTHER],
        "attention": (r"blocks\.\d+\.(?:q|k|v|attn_out)",),
        **_kv(both=r"blocks\.\d+\.[kv]"),
    },
    "auraflow": {**TARGETS[OTHER], KV_TEXT: (r"double_layers\.\d+\.attn\.w1[kv]",)},
    "boogu": {**TARGETS[OTHER], KV_TEXT: (_mixing(ending=r"instruct_to_[kv]"),)},
    "joyimage": {**TARGETS[OTHER], KV_TEXT: (_mixing(ending="txt_attn_qkv"),)},
}
TARGETS["mochi"] = TARGETS["pixeldit"] = {**TARGETS[OTHER], KV_TEXT: (_mixing(ending="qkv_y"),)}


_CLIP_ATTENTION = r"layers\.\d+\.self_attn\.(?:q|k|v|out)_proj"
# For CLIP's text models, the only text encoders that adapters' files have names for everywhere. diffusers trains the
# first (train_dreambooth_lora_sdxl.py), kohya's sd-scripts the second.
TEXT_TARGETS = {"attention": (_CLIP_ATTENTION,), "all": (_CLIP_ATTENTION, r"layers\.\d+\.mlp\.fc[12]")}


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


def exactly(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns that match the layers of these names, and no others."""
    return tuple(rf"\A{re.escape(name)}" for name in names)


def grouped(names: Iterable[str]) -> list[str]:
    """Names with their numbers as stars, each once: ``double_blocks.*.img_attn.qkv``."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        re.compile(pattern)  # alone, so that an error counts places as the user does
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise ValueError(f"the target pattern {pattern!r} is no regular expression: {error}") from error


def _multiplies(layer: nn.Module) -> bool:
    """Linear and convolution layers, and what stands in for them when weights are quantised."""
    return isinstance(layer, ADAPTABLE) or (is_multiplying(layer) and not isinstance(layer, nn.Conv3d))


def _what_exists(layers: Iterable[str]) -> str:
    return "it has " + (", ".join(grouped(layers)) or "no linear or convolution layers")
