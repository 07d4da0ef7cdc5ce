"""A short run of the core's own loop inside ComfyUI, and what the model says before and after."""

import torch
from stored_steps import LEVELS
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def memory(model):
    """Where the numbers of a model are, and a copy of them."""
    places, copies = {}, {}
    for name, parameter in model.model.named_parameters():
        parts = [parameter.as_subclass(torch.Tensor)]  # of GGUF, too
        if is_traceable_wrapper_subclass(parameter):
            parts = [getattr(parameter, part) for part in parameter.__tensor_flatten__()[0]]
        for index, part in enumerate(parts):
            places[name, index] = part.data_ptr()
            copies[name, index] = part.detach().clone().view(torch.uint8) if part.ndim else part.detach().clone()
    return places, copies


def three_steps(model, clip, folder, method="lora", **options):
    """A run of the core's own loop: its result, and the path of its file."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.families import unet_layers
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session, without_float16
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.data.dataset import Dataset, Example
    from stylewright.training.loops.config import TrainConfig
    from stylewright.training.loops.train import train

    model = without_float16(model, torch.bfloat16)
    with torch.inference_mode():
        prompts = PromptTable(clip)
        row = prompts.encode(["a star"])
    with torch.inference_mode(), training_session(model):
        denoiser = ComfyDenoiser(model, prompts)
        channels = model.model.latent_format.latent_channels
        latent = torch.randn(channels, 8, 20, generator=torch.Generator().manual_seed(2))
        config = TrainConfig(
            steps=3, accumulation=1, learning_rate=0.05, adapter=AdapterConfig(method, rank=4), clip_norm=0, **options
        )
        dataset = Dataset([Example("a", latent, row, None, "a star")], null=row)
        result = train(denoiser, dataset, config, run_dir=folder, unet_layers=unet_layers(model))
    return result


def predict(model, clip):
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session

    with torch.inference_mode(), training_session(model), torch.no_grad():
        prompts = PromptTable(clip)
        x = torch.randn(1, model.model.latent_format.latent_channels, 8, 20, generator=torch.Generator().manual_seed(4))
        return ComfyDenoiser(model, prompts)(x, LEVELS, prompts.encode(["a star"])).double()


def predict_as_trained(model, clip, path):
    """With the file's adapter attached by peft."""
    from stylewright.nodes.bridge.adapters import weights_of
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.formats.adapters import load_adapter

    with torch.inference_mode(), training_session(model), torch.no_grad():
        loaded = load_adapter(path, "native", weights=weights_of(model))
        config = AdapterConfig(method=loaded.method, rank=loaded.rank, alpha=loaded.alpha)
        prompts = PromptTable(clip)
        denoiser = ComfyDenoiser(model, prompts)
        x = torch.randn(1, model.model.latent_format.latent_channels, 8, 20, generator=torch.Generator().manual_seed(4))
        with attached(denoiser.module, config, family=denoiser.family, seed=0) as adapter:
            adapter.load_state_dict(loaded.state)
            return denoiser(x, LEVELS, prompts.encode(["a star"])).double()
