"""A LoRA for an adapter that acts by its input, from what passes while the model draws."""

from dataclasses import dataclass

import comfy.model_patcher
import torch
from torch import Tensor

from ...training.adapters.approximation import approximate
from ...training.data.cache import settle
from ...training.formats.adapters import loaded_from
from ...training.formats.approximating import approximated_file
from ...training.formats.keys import FAMILIES
from .adapters import AdapterTensors, refuse_foreign, refuse_non_finite
from .families import family_of, model_name
from .sampling import Brush, draw_from
from .session import training_session


@dataclass(frozen=True)
class Scene:
    """What is drawn: a KSampler's links."""

    positive: list
    negative: list
    latent: dict


def approximated(
    model: comfy.model_patcher.ModelPatcher, lora: AdapterTensors, scene: Scene, brush: Brush, rank: int
) -> tuple[AdapterTensors, str]:
    """The adapter as a LoRA of at most this rank, and what is lost. The model is afterwards what it was.

    ValueError for an adapter of another family, or one that needs none of this.
    """
    refuse_foreign(model, lora)
    refuse_non_finite(lora)
    if not lora.file.unmergeable:
        raise ValueError(f"{lora.name} is a change of weights already: it loads everywhere as it is")
    family = family_of(model)
    loaded = loaded_from(lora.file, "native" if family in FAMILIES else None, family=family)
    network = model.model.diffusion_model
    layers = {name for name, _ in network.named_modules()}
    if strangers := [name for name in loaded.names if name not in layers]:
        raise ValueError(
            f"{lora.name} adapts layers that {model_name(model)} has in one with others or not at all, such as "
            f"{strangers[0]}: it was trained in diffusers, where each decides for itself, and there "
            "`stylewright approximate` takes it"
        )
    positive, negative = (_settled(conditioning) for conditioning in (scene.positive, scene.negative))
    empty = settle(scene.latent["samples"])

    def draw() -> Tensor:
        return draw_from(model, empty, positive, negative, brush).float().cpu()

    with training_session(model):
        found = approximate(
            network,
            loaded.config,
            loaded.state,
            loaded.names,
            draw,
            family=family,
            rank=rank,
            seed=brush.seed,
            device=model.load_device,
        )
    return AdapterTensors(approximated_file(lora.file, found)), found.summary()


def _settled(conditioning: list) -> list:
    """With tensors that are no inference tensors, which no code outside of that mode may write to."""
    return [
        [settle(text), {name: settle(v) if isinstance(v, torch.Tensor) else v for name, v in rest.items()}]
        for text, rest in conditioning
    ]
