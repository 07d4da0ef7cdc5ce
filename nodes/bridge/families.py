"""Which of our families a loaded model belongs to."""

import comfy.model_patcher

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
# What ComfyUI passes as guidance to a distilled model that nobody gave one, and what such a model is trained with.
SAMPLING_GUIDANCE = {"flux": 3.5}
TRAINING_GUIDANCE = {"flux": 1.0}


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """A key of the target presets, or ``"other"``."""
    for kind in type(model.model.model_config).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    return OTHER


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """What ComfyUI calls the model's class, for messages and metadata."""
    return type(model.model.model_config).__name__
