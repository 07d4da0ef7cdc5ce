"""What a run begins with, where that is another adapter, and models that no run can begin on."""

from collections.abc import Sequence

import comfy.model_patcher
import torch
from torch import Tensor

from ...training.adapters.methods import AdapterConfig
from ...training.data.dataset import Dataset
from ...training.formats.adapters import loaded_from
from ...training.formats.keys import FAMILIES
from ...training.formats.starting import Start, start_of
from ...training.hosts.host import Host
from .adapters import refuse_foreign, refuse_non_finite, weights_of, with_origin
from .families import family_of, model_name
from .windowed import windowed_adapters


def start_from(model: comfy.model_patcher.ModelPatcher, lora: dict | None, config: AdapterConfig) -> Start | None:
    """The adapter of a link as a run of ``config`` on ``model`` has it; None without one.

    ValueError for one of another family or method, or where the run does not train all of its layers.
    """
    if lora is None:
        return None
    adapter, family = with_origin(lora), family_of(model)
    refuse_foreign(model, adapter)
    refuse_non_finite(adapter)
    layout = "native" if family in FAMILIES else None
    loaded = loaded_from(adapter.file, layout, family=family, weights=weights_of(model))
    if adapter.file.unmergeable:
        _refuse_apart(model, loaded.names, adapter.name)
    return start_of(loaded, config, adapter.name)


def _refuse_apart(model: comfy.model_patcher.ModelPatcher, names: Sequence[str], adapter: str) -> None:
    """ValueError where layers are parts of one here, and each has a part of the adapter that decides for itself."""
    known = {name for name, _ in model.model.diffusion_model.named_modules()}
    if strangers := [name for name in names if name not in known]:
        raise ValueError(
            f"{adapter} was trained where queries, keys and values have a layer each, as in diffusers, such as "
            f"{strangers[0]}. {model_name(model)} has them in one layer here, and no adapter of it decides for each of "
            "them: put it on the model with Load Style LoRA before this node, and train on top of it"
        )


def refuse_windowed(model: comfy.model_patcher.ModelPatcher) -> None:
    """ValueError where an adapter is no patch of weights, in which a student is told from its teacher."""
    if windowed_adapters(model):
        raise ValueError(
            "an adapter on this model acts at some noise levels only, or by the input of its layers, and distillation "
            "with it is not supported: link the model from before it, or let an adapter of the first kind act at all "
            "noise levels"
        )


@torch.no_grad()
def try_once(host: Host, dataset: Dataset) -> None:
    """Runs the model once. ValueError where it does not take what the text encoder and the VAE give, or draws lots."""
    example = dataset.examples[0]
    conditioning = {**example.conditioning, **host.training_conditioning}
    conditioning = {name: tensor.to(host.device) for name, tensor in conditioning.items()}
    before = _generators(host.device)
    try:
        host.denoiser(example.latent[None].to(host.device), torch.zeros(1, device=host.device), conditioning)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{host.name} cannot be run on what this text encoder and VAE give ({error}): connect the CLIP and the VAE "
            "that belong to the model"
        ) from error
    if any(not torch.equal(now, then) for now, then in zip(_generators(host.device), before, strict=True)):
        raise ValueError(
            "a node before draws random numbers whenever the model runs, as token merging and HyperTile do. "
            "Gradients would be of other numbers than the loss: link the model from before that node"
        )


def _generators(device: torch.device | str) -> list[Tensor]:
    """The states of torch's global generators, of the CPU and of the device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if torch.device(device).type == "cuda" else states
