"""What travels over our own links."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..training.data.concepts import PRIOR_SHARE
from ..training.data.items import Item
from ..training.density_presets import DensityConfig

DATASET = io.Custom("STYLE_DATASET")
DENSITY = io.Custom("STYLE_DENSITY")
# ComfyUI's own types, so that its LoraModelLoader, SaveLoRA and LossGraphNode work with ours.
LORA = io.Custom("LORA_MODEL")
LOSS_MAP = io.Custom("LOSS_MAP")


@dataclass(frozen=True)
class StyleDataset:
    """STYLE_DATASET: pictures with checked captions, not yet encoded, for no model encodes like another."""

    items: tuple[Item, ...]
    style_phrase: str
    caption_mode: str
    resolution: int  # pixels: sample pictures have about resolution² of them; items state their own sizes
    answers: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # what captions of CONDITIONING stand for
    prior_share: float = PRIOR_SHARE  # of the samples, where there are items for prior preservation
    notes: tuple[str, ...] = ()  # what a person should know of it, where it is made and where it is trained on


@dataclass(frozen=True)
class StyleDensity:
    """STYLE_DENSITY: a law of the noise level, not yet fitted to a model or a picture size."""

    config: DensityConfig
