"""Which of our families a loaded model belongs to, and what else its class says."""

import comfy.model_patcher

from ...training.formats.keys import UNET_LAYERS

# Attachment of a MODEL whose laws of the noise level are stated for pictures of so many image tokens.
REFERENCE_TOKENS = "stylewright.reference_tokens"
OTHER = "other"  # a family we have no presets for: generic targets

# comfy.supported_models class -> family of the target presets. A class counts for what derives from it.
FAMILIES = {
    "SD15": "sd15",
    "SDXL": "sdxl",
    "SD3": "sd3",
    "Flux2": OTHER,  # derives from Flux, and is none
    "Flux": "flux",
    "PixArtAlpha": "pixart",
}


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """A key of the target presets, or ``"other"``."""
    for kind in type(model.model.model_config).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    return OTHER


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """What ComfyUI calls the model's class, for messages and metadata."""
    return type(model.model.model_config).__name__


def is_guidance_distilled(model: comfy.model_patcher.ModelPatcher) -> bool:
    """FLUX.1-dev and its kin, which are told a guidance scale instead of being run twice."""
    return bool(model.model.model_config.unet_config.get("guidance_embed", False))


def latents_per_token(model: comfy.model_patcher.ModelPatcher) -> int:
    """Side of a token in latent pixels. A UNet has no tokens; counted like a transformer's, one rule holds for all."""
    return int(model.model.model_config.unet_config.get("patch_size", 2) or 2)


def reference_tokens(model: comfy.model_patcher.ModelPatcher) -> int | None:
    """Image tokens that laws of the noise level are stated for, carried to those of the pictures. None = for any."""
    return model.get_attachment(REFERENCE_TOKENS)


def unet_layers(model: comfy.model_patcher.ModelPatcher) -> int:
    """Residual layers a level of a UNet, which its adapters' names depend on; for other models it means nothing."""
    levels = model.model.model_config.unet_config.get("num_res_blocks") or [UNET_LAYERS]
    return levels if isinstance(levels, int) else levels[0]
