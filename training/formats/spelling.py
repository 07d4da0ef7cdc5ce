"""How files spell an adapter: prefixes and separators of layer names, and the ends that say which tensor it is.

Styles: ``kohya`` (sd-scripts, LyCORIS: underscores), ``comfyui`` (dots, native names), ``diffusers`` and ``peft``
(dots, no ``.alpha``: a reader takes alpha = rank, so the scale is in the tensors).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .keys import TEXT_ENCODER
from .layers import Layer

_SHARED = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)
# our name of a tensor -> the end of its key
KOHYA = {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale", **{n: n for n in _SHARED}}
PEFT = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector", **{n: n for n in _SHARED}}
PEFT["oft_R"] = "oft_R.weight"
PEFT |= {name: name for name in (f"styleinject_{part}" for part in "ABRr")}
PEFT |= {f"bottleneck_{part}": f"bottleneck_{part}" for part in ("down", "up", "d", "u", "shared_down", "shared_up")}
# The rotation of inputs as a product: W a1 a2 (GLoRA), which ComfyUI knows. b1 b2, which it adds, is zero.
GLORA = {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}
ALPHA = "alpha"
_OTHERS = {"lora.down.weight": "A", "lora.up.weight": "B", "lora_linear_layer.down.weight": "A"}
_OTHERS |= {"lora_linear_layer.up.weight": "B", "lora_magnitude_vector.weight": "magnitude", ALPHA: ALPHA}
_ENDS = {end: name for ends in (KOHYA, PEFT, GLORA) for name, end in ends.items()} | _OTHERS
_ENDS["dora_scale"] = "dora_scale"  # not always a magnitude: its shape says which side it scales
_LONGEST_FIRST = sorted(_ENDS, key=len, reverse=True)

SPELLINGS: dict[str, Mapping[str, str]] = {"kohya": KOHYA, "comfyui": KOHYA, "diffusers": PEFT, "peft": PEFT}
WITHOUT_ALPHA = ("diffusers", "peft")
STYLES = tuple(SPELLINGS)

# Prefixes of names with underscores for dots -> the part of a pipeline. sd-scripts says te for SD1.5's only one.
_UNDERSCORED = {
    "lora_unet_": "",
    "lycoris_": "",
    "lora_transformer_": "",
    "lora_te_": f"{TEXT_ENCODER}.",
    "lora_te1_": f"{TEXT_ENCODER}.",
    "lora_te2_": f"{TEXT_ENCODER}_2.",
    "lora_te3_": f"{TEXT_ENCODER}_3.",
}
_DOTTED = {
    "base_model.model.": "",
    "model.diffusion_model.": "",
    "diffusion_model.": "",
    "transformer.": "",
    "unet.": "",
    "text_encoders.clip_l.transformer.": f"{TEXT_ENCODER}.",
    "text_encoders.clip_g.transformer.": f"{TEXT_ENCODER}_2.",
}
# Parts of layer names that have an underscore of their own; every other underscore of kohya's was a dot.
_COMPOUND = (
    *("single_transformer_blocks", "transformer_blocks", "double_blocks", "single_blocks", "joint_blocks"),
    *("input_blocks", "middle_block", "output_blocks", "down_blocks", "mid_block", "up_blocks"),
    *("img_attn", "txt_attn", "img_mod", "txt_mod", "img_mlp", "txt_mlp", "img_in", "txt_in", "time_in", "vector_in"),
    *("guidance_in", "in_layer", "out_layer", "final_layer", "adaLN_modulation", "x_block", "context_block"),
    *("x_embedder", "y_embedder", "t_embedder", "context_embedder", "csize_embedder", "ar_embedder", "y_proj"),
    *("t_block", "cross_attn", "q_linear", "kv_linear", "in_layers", "out_layers", "emb_layers", "skip_connection"),
    *("time_embed", "label_emb", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj"),
    *("add_v_proj", "to_add_out", "ff_context", "norm1_context", "proj_mlp", "norm_out", "time_text_embed"),
    *("timestep_embedder", "text_embedder", "guidance_embedder", "resolution_embedder", "aspect_ratio_embedder"),
    *("time_embedding", "add_embedding", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "linear_1"),
    *("linear_2", "pos_embed", "caption_projection", "adaln_single", "text_model", "self_attn", "q_proj", "k_proj"),
    *("distilled_guidance_layer", "individual_token_refiner", "token_refiner", "refiner_blocks", "nerf_blocks"),
    *("nerf_final_layer", "nerf_image_embedder", "double_stream_modulation", "single_stream_modulation"),
    *("v_proj", "out_proj", "text_projection", "wi_0", "wi_1"),
)
_TOKEN = re.compile("(?:" + "|".join(sorted(_COMPOUND, key=len, reverse=True)) + r"|[^_]+)(?=_|$)")


def read_key(key: str) -> tuple[str, str] | None:
    """(layer name with dots, our name of the tensor) of a key in any style; None for what is no adapter's."""
    # peft's state dicts may carry the adapter's name, "lora_A.default.weight".
    plain = key.replace(".default.", ".").removesuffix(".default")
    for end in _LONGEST_FIRST:
        if plain.endswith(f".{end}"):
            return _layer_name(plain[: -len(end) - 1]), _ENDS[end]
    return None


def _layer_name(name: str) -> str:
    for prefix, part in _UNDERSCORED.items():
        if name.startswith(prefix) and "." not in name:
            return part + ".".join(_TOKEN.findall(name[len(prefix) :]))
    for prefix, part in _DOTTED.items():
        if name.startswith(prefix):
            return _layer_name(part + name[len(prefix) :]) if not part else part + name[len(prefix) :]
    return name


def write_name(style: str, family: str, layout: str, name: str) -> str:
    """A layer's name as the style spells it. A diffusers layout in a native style is what could not be fused."""
    if name.startswith(TEXT_ENCODER) and style == "kohya":
        encoder, _, rest = name.partition(".")
        number = encoder.removeprefix(TEXT_ENCODER).removeprefix("_") or ("" if family == "sd15" else "1")
        return f"lora_te{number}_{rest.replace('.', '_')}"
    if style == "peft":
        return f"base_model.model.{name}"
    if style == "kohya" and (layout == "native" or family in _UNETS):
        return f"lora_unet_{name.replace('.', '_')}"
    if name.startswith(TEXT_ENCODER):
        return name  # diffusers' own, and known to ComfyUI for the CLIP of every family
    if style == "comfyui" and layout == "native":
        return f"diffusion_model.{name}"
    return f"unet.{name}" if family in _UNETS else f"transformer.{name}"


_UNETS = ("sd15", "sdxl")


def style_of(keys: Iterable[str]) -> str | None:
    """The style that most of these keys are in; None where there is none."""
    found = Counter(style for key in keys for start, style in _STARTS.items() if key.startswith(start))
    return found.most_common(1)[0][0] if found else None


_STARTS = {"lora_unet_": "kohya", "lora_te": "kohya", "lycoris_": "kohya", "diffusion_model.": "comfyui"}
_STARTS |= {"transformer.": "diffusers", "unet.": "diffusers", "base_model.model.": "peft"}


def read_alpha(method: str, tensors: Mapping[str, Tensor], alpha: Tensor | None) -> float:
    """The scale of a layer: alpha / rank, 1 without an alpha, and always 1 for a LoKr of two whole factors."""
    rank = Layer(method, tensors).rank
    return 1.0 if alpha is None or rank is None or method == "oft" else alpha.item() / rank


def write_layer(style: str, layer: Layer) -> dict[str, Tensor]:
    """A layer's tensors by the ends of their keys, with ``.alpha`` where the style has one."""
    ends = GLORA if "a1" in layer.tensors else SPELLINGS[style]
    written = {ends[name]: value for name, value in layer.tensors.items()}
    if "magnitude" in layer.tensors:
        # (out,) in peft's Linear, (1, out, 1, 1) in its convolutions, and like the weight, (out, 1[, 1, 1]), elsewhere.
        inner = [1] * (layer.tensors["A"].dim() - 2)
        shape = [-1, 1, *inner] if ends is KOHYA else [1, -1, *inner] if inner else [-1]
        written[ends["magnitude"]] = layer.tensors["magnitude"].reshape(shape)
    if ends is KOHYA and layer.rank is not None:
        written[ALPHA] = torch.tensor(layer.scale * layer.rank, dtype=torch.float32)
    return written
