"""Names of layers: which layout they are in, and what they are called in the other one."""

from collections.abc import Iterable

from .keys_transformers import TRANSFORMERS, NativePlace
from .keys_unet import UP_BLOCKS_WITHOUT_ATTENTION, unet_to_diffusers, unet_to_native

LAYOUTS = ("diffusers", "native")
FAMILIES = (*TRANSFORMERS, *UP_BLOCKS_WITHOUT_ATTENTION)
UNET_LAYERS = 2  # residual layers a level of SD1.5 and SDXL
TEXT_ENCODER = "text_encoder"  # names of these layers begin so, and are the same in every layout


def native_place(family: str, name: str, unet_layers: int = UNET_LAYERS) -> NativePlace | None:
    """Where a diffusers layer is in the native layout; None for a name that is not diffusers'."""
    if family in TRANSFORMERS:
        return TRANSFORMERS[family].to_native(name)
    native = unet_to_native(family, name, unet_layers) if family in FAMILIES else None
    return NativePlace(native) if native else None


def diffusers_names(family: str, name: str, unet_layers: int = UNET_LAYERS) -> tuple[str, ...] | None:
    """The diffusers layers that a native layer stacks; None for a name that is not native."""
    if family in TRANSFORMERS:
        return TRANSFORMERS[family].to_diffusers(name)
    diffusers = unet_to_diffusers(name, unet_layers) if family in FAMILIES else None
    return (diffusers,) if diffusers else None


def is_swapped(family: str, native: str, inputs: int, outputs: int) -> bool:
    """Whether a native layer's two output halves are the other way round in diffusers."""
    names = TRANSFORMERS.get(family)
    return names is not None and native.endswith(names.swapped or "\0") and outputs == 2 * inputs


def layout_of(family: str, names: Iterable[str], unet_layers: int = UNET_LAYERS) -> str:
    """The layout that all these names are of. ValueError names one that fits none, or mixed layouts.

    Text encoders have the same names in every layout.
    """
    candidates = set(LAYOUTS)
    for name in names:
        if name.startswith(TEXT_ENCODER):
            continue
        fits = set()
        if native_place(family, name, unet_layers):
            fits.add("diffusers")
        if diffusers_names(family, name, unet_layers):
            fits.add("native")
        if not fits:
            raise ValueError(f"{name} is no layer of the family {family!r}, in diffusers' names or in native ones")
        candidates &= fits
        if not candidates:
            raise ValueError(f"the layers mix diffusers' names and native ones: {name} is of the other kind")
    return sorted(candidates)[0]


def detect_family(names: Iterable[str]) -> str | None:
    """The family whose layers have such names; None where they tell nothing.

    It is a guess: SD1.5 for a UNet that may be either, FLUX for what may be Chroma's.
    """
    joined = "\n".join(sorted(names)) + "\n"
    for family, marks in _MARKS.items():
        if any(mark in joined for mark in marks):
            return family
    return None


# The first family with a mark in a name. FLUX's double blocks have the same diffusers names as SD3's, and the kin of
# either have theirs: what has none of their own marks cannot be told from FLUX or SD3, and is taken for them.
_MARKS: dict[str, tuple[str, ...]] = {
    "chroma-radiance": ("nerf_blocks.", "nerf_final_layer", "nerf_image_embedder."),
    "chroma": ("distilled_guidance_layer.",),  # in place of FLUX's modulations
    "hunyuan-video": (
        *("individual_token_refiner.", "token_refiner.refiner_blocks.", "img_attn_qkv", "img_attn_proj"),
        *("txt_attn_qkv", "txt_attn_proj", "img_mlp.fc1", "img_mlp.fc2", "txt_mlp.fc1", "txt_mlp.fc2"),
        *("img_mod.linear", "txt_mod.linear", ".modulation.linear"),
    ),
    "flux2": ("double_stream_modulation", "single_stream_modulation", "to_qkv_mlp_proj", "ff.linear_in"),
    "qwen-image": ("img_mlp.net.", "txt_mlp.net.", "img_mod.1", "txt_mod.1"),
    "flux": ("double_blocks.", "single_blocks.", "single_transformer_blocks."),
    "sd3": ("joint_blocks.", "attn.add_q_proj", "attn.to_add_out", "norm1_context."),
    "sdxl": (
        "label_emb.",
        "add_embedding.",
        "input_blocks.4.1.transformer_blocks.1.",
        "down_blocks.1.attentions.0.transformer_blocks.1.",
        "mid_block.attentions.0.transformer_blocks.1.",
        "middle_block.1.transformer_blocks.1.",
        "output_blocks.0.1.transformer_blocks.",
        "up_blocks.0.attentions.",
    ),
    "sd15": ("input_blocks.", "output_blocks.", "middle_block.", "down_blocks.", "up_blocks.", "mid_block."),
    "pixart": ("cross_attn.kv_linear", "cross_attn.q_linear", "adaln_single.", "\nblocks.0.attn.qkv", "attn1.to_q"),
}
