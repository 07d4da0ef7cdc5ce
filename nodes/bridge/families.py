"""Which family a loaded model belongs to, what else its class says, and why some cannot be trained on pictures."""

import comfy.latent_formats
import comfy.model_patcher
import torch

from ...training.formats.keys import UNET_LAYERS

# Attachment of a MODEL whose laws of the noise level are stated for pictures of so many image tokens.
REFERENCE_TOKENS = "stylewright.reference_tokens"
SIDE = "stylewright.side"  # attachment of a MODEL that draws pictures of one size alone: their side in pixels
OTHER = "other"  # a class of ComfyUI's that is younger than this table

# comfy.supported_models class -> family, of the target presets and in the files of adapters. A class counts for what
# derives from it, unless that has a line of its own.
FAMILIES = {
    "SD15": "sd15",
    "SD20": "sd21",
    "SDXL": "sdxl",
    "SDXLRefiner": "sdxl-refiner",
    "SD3": "sd3",
    "Flux": "flux",
    "Flux2": "flux2",
    "Chroma": "chroma",
    "ChromaRadiance": "chroma-radiance",
    "PixArtAlpha": "pixart",
    "Lumina2": "lumina2",
    "ZImage": "z-image",
    "ZImagePixelSpace": "z-image-pixel",
    "QwenImage": "qwen-image",
    "AuraFlow": "auraflow",
    "HiDream": "hidream",
    "HiDreamO1": "hidream-o1",
    "HunyuanDiT": "hunyuan-dit",
    "HunyuanImage21": "hunyuan-image21",
    "CosmosT2V": "cosmos",
    "CosmosT2IPredict2": "cosmos-predict2",
    "Anima": "anima",
    "Omnigen2": "omnigen2",
    "Boogu": "boogu",
    "Krea2": "krea2",
    "LongCatImage": "longcat-image",
    "Kandinsky5Image": "kandinsky5-image",
    "ErnieImage": "ernie-image",
    "Ideogram4": "ideogram4",
    "Lens": "lens",
    "JoyImage": "joyimage",
    "MageFlow": "mage-flow",
    "PixelDiTT2I": "pixeldit",
    "WAN21_T2V": "wan21",
    "WAN22_T2V": "wan22",
    "HunyuanVideo": "hunyuan-video",
    "HunyuanVideo15": "hunyuan-video15",
    "LTXV": "ltxv",
    "GenmoMochi": "mochi",
    "Kandinsky5": "kandinsky5",
    "CogVideoX_T2V": "cogvideox",
}

_NEEDS_PICTURE = "it draws from a picture, and a style's pictures have no counterpart to draw from"
_NEEDS_MOTION = "it draws from a film, a pose, a camera or a sound, which a style's pictures do not have"
_SHAPES = "it makes shapes in space, and no pictures"
_READS = "it reads pictures, and draws none"
_ENLARGES = "it enlarges pictures, and draws none from words"

REFUSED = {
    "Stable_Cascade_C": "it draws in two stages, and is the first of two models that would both have to learn",
    "Stable_Cascade_B": "it draws in two stages, and is the second: it draws from the latents of the first",
    "LotusD": "it estimates depth, and draws no pictures",
    "SD_X4Upscaler": _ENLARGES,
    "SeedVR2": _ENLARGES,
    "PiD": _ENLARGES,
    "HunyuanVideo15_SR_Distilled": _ENLARGES,
    "HunyuanImage21Refiner": "it refines pictures of HunyuanImage, and draws none from words",
    "SD15_instructpix2pix": _NEEDS_PICTURE,
    "SDXL_instructpix2pix": _NEEDS_PICTURE,
    "SVD_img2vid": _NEEDS_PICTURE,
    "Stable_Zero123": _NEEDS_PICTURE,
    "HunyuanVideoI2V": _NEEDS_PICTURE,
    "HunyuanVideoSkyreelsI2V": _NEEDS_PICTURE,
    "CosmosI2V": _NEEDS_PICTURE,
    "CosmosI2VPredict2": _NEEDS_PICTURE,
    "CogVideoX_I2V": _NEEDS_PICTURE,
    "CogVideoX_Inpaint": _NEEDS_PICTURE,
    "WAN21_I2V": _NEEDS_PICTURE,
    "WAN21_FunControl2V": _NEEDS_MOTION,
    "WAN21_Vace": _NEEDS_MOTION,
    "WAN21_Camera": _NEEDS_MOTION,
    "WAN22_Camera": _NEEDS_MOTION,
    "WAN22_S2V": _NEEDS_MOTION,
    "WAN21_HuMo": _NEEDS_MOTION,
    "WAN22_Animate": _NEEDS_MOTION,
    "WAN_Animate2": _NEEDS_MOTION,
    "WAN21_FlowRVS": _NEEDS_MOTION,
    "WAN21_SCAIL": _NEEDS_MOTION,
    "WAN22_WanDancer": _NEEDS_MOTION,
    "WAN21_CausalAR_T2V": "it draws a film frame by frame, each from those before",
    "LTXAV": "its latents are a film and a sound in one, and a picture has no sound",
    "MiniMaxH3": "its latents are a film and a sound in one, and a picture has no sound",
    "Hunyuan3Dv2": _SHAPES,
    "TripoSplat": _SHAPES,
    "Trellis2": _SHAPES,
    "ACEStep": "it makes sound, and no pictures",
    "RT_DETR_v4": _READS,
    "SAM3": _READS,
    "DepthAnything3": _READS,
}
# Fill the channels of a first picture with zeros by themselves where there is none.
_FILLS_CHANNELS = ("HunyuanVideo15", "Kandinsky5")

# Told of a picture's sizes: height and width of the original and of what is kept, and some of them where it was cut.
_TOLD_SIZES = ("sdxl", "sdxl-refiner", "pixart", "hunyuan-dit")

# Sides of a token in latent pixels, of families whose configuration does not say, or says it of something else.
_LATENTS_PER_TOKEN = {"ltxv": 1, "lens": 1, "ideogram4": 1, "mage-flow": 1, "hidream-o1": 32}
_STATES_PATCH = ("patch_size", "patch_spatial", "patch")


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """The family's name, or ``"other"``."""
    return FAMILIES.get(_listed(model, FAMILIES), OTHER)


def _listed(model: comfy.model_patcher.ModelPatcher, *tables: dict[str, str]) -> str:
    """The nearest of the model's classes that has a line in a table; "" where none has."""
    kinds = [kind.__name__ for kind in type(model.model.model_config).__mro__]
    return next((kind for kind in kinds if any(kind in table for table in tables)), "")


def refuse_untrainable(model: comfy.model_patcher.ModelPatcher) -> None:
    """ValueError, with the family's name and the reason, for a model that does not draw pictures from words alone."""
    reason = _why_untrainable(model)
    if reason is not None:
        raise ValueError(f"{model_name(model)} cannot be trained on pictures and captions: {reason}")


def _why_untrainable(model: comfy.model_patcher.ModelPatcher) -> str | None:
    listed = _listed(model, FAMILIES, REFUSED)
    if listed in REFUSED:
        return REFUSED[listed]
    form = latent_format(model)
    if form.latent_dimensions not in (2, 3):
        return f"its latents have {form.latent_dimensions} dimension, those of pictures 2: it makes sounds or shapes"
    size = (8, 8) if form.latent_dimensions == 2 else (1, 8, 8)
    nothing = torch.zeros(1, form.latent_channels, *size)
    added = model.model.concat_cond(noise=nothing, latent_image=nothing, device=nothing.device)
    if added is not None and listed not in _FILLS_CHANNELS:
        return (
            f"it takes {added.shape[1]} channels more than a latent has, for a picture or a mask to draw from "
            "(inpainting, editing, control), which a style's pictures do not have"
        )
    return None


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """What ComfyUI calls the model's class, for messages and metadata."""
    return type(model.model.model_config).__name__


def latent_format(model: comfy.model_patcher.ModelPatcher) -> comfy.latent_formats.LatentFormat:
    """Of the model's latents, patches of it included (Playground 2.5's)."""
    return model.get_model_object("latent_format")


def is_film(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether a picture is a film of one frame to the model, as to Wan and Qwen-Image: latents (b, c, 1, h, w)."""
    return latent_format(model).latent_dimensions == 3


def is_mean_flow(model: comfy.model_patcher.ModelPatcher) -> bool:
    """HunyuanImage's distilled form: it is told two times, and the second is one for all rows of a batch."""
    return bool(model.model.model_config.unet_config.get("meanflow", False))


def is_guidance_distilled(model: comfy.model_patcher.ModelPatcher) -> bool:
    """FLUX.1-dev and its kin, which are told a guidance scale instead of being run twice."""
    return bool(model.model.model_config.unet_config.get("guidance_embed", False))


def is_told_sizes(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether the model, or one of its family, takes the sizes of the picture as conditioning."""
    return family_of(model) in _TOLD_SIZES


def latents_per_token(model: comfy.model_patcher.ModelPatcher) -> int:
    """Side of a token in latent pixels. A UNet has no tokens; counted like a transformer's, one rule holds for all."""
    family = family_of(model)
    if family in _LATENTS_PER_TOKEN:
        return _LATENTS_PER_TOKEN[family]
    network = model.model.diffusion_model
    for stated in (model.model.model_config.unet_config, vars(network)):
        for name in _STATES_PATCH:
            if size := stated.get(name):
                return int(size if isinstance(size, int) else size[-1])  # (frames, height, width) of films
    return 2


def smallest_side(model: comfy.model_patcher.ModelPatcher) -> int:
    """Of latents that the model works with: ComfyUI's PixArt divides by a side that it rounds to multiples of 64."""
    return 36 if family_of(model) == "pixart" else 1


def reference_tokens(model: comfy.model_patcher.ModelPatcher) -> int | None:
    """Image tokens that laws of the noise level are stated for, carried to those of the pictures. None = for any."""
    return model.get_attachment(REFERENCE_TOKENS)


def other_side(model: comfy.model_patcher.ModelPatcher, side: int) -> str:
    """What is to be said of pictures of another side than a model's own; "" = nothing, or it states none."""
    own = model.get_attachment(SIDE)
    if own in (None, side):
        return ""
    return f"this model draws pictures of {own} pixels, and resolution is {side}, which it has never learned: set {own}"


def unet_layers(model: comfy.model_patcher.ModelPatcher) -> int:
    """Residual layers a level of a UNet, which its adapters' names depend on; for other models it means nothing."""
    levels = model.model.model_config.unet_config.get("num_res_blocks") or [UNET_LAYERS]
    return levels if isinstance(levels, int) else levels[0]
