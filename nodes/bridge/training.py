"""A training run inside ComfyUI: three sockets and a dataset in, an adapter in models/loras out."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ...training.adapters.attach import layers_to_adapt
from ...training.data.cache import digest
from ...training.data.captions import styled
from ...training.data.dataset import Dataset
from ...training.data.encoding import encode
from ...training.data.items import Item
from ...training.errors import TrainingError
from ...training.formats.contents import read_adapter
from ...training.formats.state import write_atomically
from ...training.hosts.generate import generate
from ...training.hosts.host import Host
from ...training.loops.checkpoint import FREE, RunDirectory
from ...training.loops.config import TrainConfig, config_to_table
from ...training.loops.train import TrainResult, train
from .adapters import AdapterTensors, read_tensors
from .families import latents_per_token, model_name
from .files import free_adapter_path, run_folder
from .host import comfy_host
from .previews import TrainingProgress, decoder_for_previews
from .session import training_session, without_float16

logger = logging.getLogger(__name__)

# A backward pass with checkpointing keeps a few times what sampling needs. ComfyUI makes that much room.
MEMORY_FACTOR = 4


@dataclass(frozen=True)
class Sockets:
    """The user's model, loaded by whatever nodes."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE


@dataclass(frozen=True)
class Job:
    """What a node asks for."""

    items: Sequence[Item]
    caption_mode: str
    config: TrainConfig
    file_name: str  # pattern under models/loras
    sample_steps: int
    sample_cfg: float


@dataclass(frozen=True)
class TrainedAdapter:
    tensors: AdapterTensors
    losses: list[float]  # mean of each optimizer step
    path: Path


def train_adapter(sockets: Sockets, job: Job, node_id: str | None = None) -> TrainedAdapter:
    """Trains, and saves the adapter under a free name. The model is afterwards what it was.

    An interrupt, or whatever else stops the run, leaves the adapter of the last complete step beside the others, and
    is raised again. The same job, asked for once more, continues where it stopped.
    """
    config, resolution = job.config, job.config.resolution
    assert resolution is not None, "a dataset states one"
    model = without_float16(sockets.model, getattr(torch, config.precision))
    sockets = replace(sockets, model=model)
    path = free_adapter_path(job.file_name)
    host = comfy_host(model, sockets.clip, sockets.vae, resolution=resolution)
    config = replace(config, density=config.density.stated_for(host.reference_tokens))
    job = replace(job, config=config)
    layers_to_adapt(host.denoiser.module, config.adapter, family=host.denoiser.family)  # before pictures are encoded
    progress = TrainingProgress(config.steps, node_id)
    dataset = encode(
        job.items,
        host,
        resolution=resolution,
        style_phrase=config.style_phrase,
        caption_mode=job.caption_mode,
        caption_dropout=config.caption_dropout,
        progress=progress.encoded,
    )
    prompts = sample_prompts(config)
    host.encode_prompts(prompts)  # now: loading the text encoder later could push the model out of memory
    latent = dataset.examples[0].latent
    memory = MEMORY_FACTOR * model.memory_required([config.batch_size, *latent.shape])
    decode = decoder_for_previews(model, sockets.vae, host)
    with training_session(model, memory_required=memory):
        _try(host, dataset)
        run = RunDirectory(run_folder(f"{path.stem.rstrip('_0123456789')}-{fingerprint(model, dataset, config)}"))
        try:
            result = _train(sockets, job, replace(host, decode_latents=decode), dataset, run.path, progress)
        except BaseException:
            _publish_partial(run, path)
            raise
    with _kept(run):
        publish(run.adapter, path)
    for file in (run.adapter, run.checkpoint):  # several times the adapter's size, and of no more use
        file.unlink(missing_ok=True)
    logger.info("trained %d steps, saved %s", result.steps_done, path)
    progress.finished(f"{result.steps_done} steps, saved {path.name}")
    return TrainedAdapter(read_tensors(path), result.losses, path)


def _train(
    sockets: Sockets, job: Job, host: Host, dataset: Dataset, run_dir: Path, progress: TrainingProgress
) -> TrainResult:
    config = job.config
    prompts = sample_prompts(config)
    side = host.resolution - host.resolution % host.pixels_per_token

    def sample(step: int) -> Tensor:
        return generate(
            host,
            prompts,
            seed=config.seed,
            steps=job.sample_steps,
            guidance_scale=job.sample_cfg,
            size=(side, side),
        )

    return train(
        host.denoiser,
        dataset,
        config,
        run_dir=run_dir,
        report=progress.report,
        sample=sample if prompts else None,
        device=host.device,
        latents_per_token=latents_per_token(sockets.model) ** 2,
        conditioning=host.training_conditioning,
        base_model=model_name(sockets.model),
        unet_layers=host.unet_layers,
    )


@torch.no_grad()
def _try(host: Host, dataset: Dataset) -> None:
    """Runs the model once. ValueError where it does not take what the text encoder and the VAE give."""
    example = dataset.examples[0]
    conditioning = {**example.conditioning, **host.training_conditioning}
    conditioning = {name: tensor.to(host.device) for name, tensor in conditioning.items()}
    try:
        host.denoiser(example.latent[None].to(host.device), torch.zeros(1, device=host.device), conditioning)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{host.name} cannot be run on what this text encoder and VAE give ({error}): connect the CLIP and the VAE "
            "that belong to the model"
        ) from error


@contextmanager
def _kept(run: RunDirectory) -> Iterator[None]:
    """Says that nothing is lost where the finished adapter cannot be copied."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"the adapter is trained and could not be saved in models/loras ({error.strerror}): make room, and queue "
            f"again, which trains nothing anew. It is also here: {run.adapter}"
        ) from error


def sample_prompts(config: TrainConfig) -> list[str]:
    """What is drawn while training: the user's prompts, in the style's own words."""
    phrase = config.style_phrase
    return [styled(prompt, phrase) if phrase else prompt for prompt in config.sample_prompts]


def publish(source: Path, target: Path) -> None:
    """A copy of a run's adapter, which is there whole or not at all."""
    write_atomically(target, lambda temporary: _copy(source, temporary))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _publish_partial(run: RunDirectory, path: Path) -> None:
    """The adapter of a run that stopped, under a name that says so."""
    about = read_adapter(run.adapter).about if run.adapter.exists() else None
    if about is None or not about.steps:
        return
    so_far = path.with_name(f"{path.stem}partial{path.suffix}")
    publish(run.adapter, so_far)
    logger.warning("stopped at step %d; the adapter so far is %s, and the same run will continue", about.steps, so_far)


def fingerprint(model: comfy.model_patcher.ModelPatcher, dataset: Dataset, config: TrainConfig) -> str:
    """Names the run of these settings on this data and these weights, patches included: 12 hexadecimal digits."""
    options = {name: value for name, value in config_to_table(config).items() if name not in FREE}
    return digest(dataset.fingerprint(), repr(sorted(options.items())), config.steps, _sample_of(model.model))[:12]


def _sample_of(module: nn.Module) -> Tensor:
    """A few numbers of every weight, which tell one model from another of the same shape."""
    pieces = [
        parameter.detach().flatten()[:: max(1, parameter.numel() // 4)][:4].float().cpu()
        for parameter in module.parameters()
    ]
    return torch.cat(pieces)
