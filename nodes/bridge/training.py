"""A training run inside ComfyUI: three sockets and a dataset in, an adapter in models/loras out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ...training.adapters.methods import AdapterConfig
from ...training.data.captions import contains, styled
from ...training.data.concepts import PRIOR_SHARE, STYLE
from ...training.data.dataset import Dataset
from ...training.data.encoding import encode
from ...training.data.items import Item
from ...training.density_presets import style_window
from ...training.formats.starting import Start
from ...training.hosts.host import Host
from ...training.loops.checkpoint import RunDirectory
from ...training.loops.config import TrainConfig
from ...training.loops.events import Event
from ...training.loops.samples import find_samples
from ...training.loops.saving import Saving
from ...training.loops.subject import parts_of
from ...training.loops.teaching import Answers
from ...training.loops.train import TrainResult, train
from .adapters import read_tensors
from .board import Address
from .denoiser import ComfyDenoiser
from .encodings import Encodings
from .families import latents_per_token, model_name
from .files import adapter_pattern
from .given import for_model, require_sockets
from .host import comfy_host
from .identity import identity_of
from .memory import Training, leave_device, train_within_memory
from .outcome import TrainedAdapter, as_it_is, kept, published_if_stopped, reporter
from .previews import TrainingProgress
from .prompts import conditioning_of
from .publishing import publish
from .resuming import AUTOMATIC
from .runs import ENCODED, choose, clear_states, new_run, opened
from .sample_pictures import draw, draw_before
from .sampling import Brush, Painter, Subject
from .session import raise_if_interrupted, without_float16
from .starting import start_from, try_once
from .teacher import ask_teacher, teacher_identity
from .text_encoders import describe, resident, trainable_text_encoders

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sockets:
    """The user's model, loaded by whatever nodes."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP | None  # None where captions are conditioning
    vae: comfy.sd.VAE | None  # None where pictures are latents


@dataclass(frozen=True)
class Job:
    """What a node asks for."""

    items: Sequence[Item]
    caption_mode: str
    config: TrainConfig
    file_name: str  # pattern under models/loras
    brush: Brush  # of the sample pictures
    negative: str = ""  # their negative prompt
    resume: str = AUTOMATIC  # one of RESUME
    save_intermediate: bool = False  # the adapter of every checkpoint goes to models/loras too
    keep_checkpoints: int = 3  # of this file name's finished runs, the newest that can be trained further
    init_lora: dict | None = None  # an adapter to begin with
    answers: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # what captions of CONDITIONING stand for
    prior_share: float = PRIOR_SHARE  # of the samples, where there are items for prior preservation
    notes: Sequence[str] = ()  # of the dataset, for its person
    teacher: comfy.model_patcher.ModelPatcher | None = None  # whose answers are learned; None = the pictures


def train_adapter(sockets: Sockets, job: Job, address: Address | None = None) -> TrainedAdapter:
    """Trains, and saves the adapter under a free name. The model is afterwards what it was.

    A run of the same file name and options that is there is continued; a finished one is given back. An interrupt, or
    whatever else stops the run, leaves the adapter of the last complete step beside the others, and is raised again.
    """
    progress = TrainingProgress(job.config.steps, address)
    with progress.watched():
        return _run(sockets, job, progress)


def _run(sockets: Sockets, job: Job, progress: TrainingProgress) -> TrainedAdapter:
    config, resolution = job.config, job.config.resolution
    for note in job.notes:
        progress.noted(note)
    assert resolution is not None, "a dataset states one"
    model = without_float16(sockets.model, getattr(torch, config.precision))
    sockets = replace(sockets, model=model)
    words = words_of(model, config.style_phrase, resolution, config.seed, config.adapter)
    filled = adapter_pattern(job.file_name, words)
    require_sockets(sockets.clip, sockets.vae, job.items, job.answers, config)
    encodings = Encodings()
    host = comfy_host(model, sockets.clip, sockets.vae, resolution=resolution, answers=job.answers, encodings=encodings)
    config = replace(config, density=config.density.stated_for(host.reference_tokens))
    job = replace(job, config=config)
    if config.text_encoder_learning_rate:
        host = replace(host, text_encoders=trainable_text_encoders(sockets.clip))
    for part in parts_of(host.denoiser, config, host.text_encoders):  # before pictures are encoded
        part.layers(config.adapter)
    identity = identity_of(
        host.denoiser, model, sockets.clip, sockets.vae, job.items, job.caption_mode, job.prior_share
    )
    if start := start_from(model, job.init_lora, config.adapter):
        identity["start"] = start.digest
    if job.teacher is not None:
        identity["teacher"] = teacher_identity(job.teacher, model, host)
        progress.noted("learns what the teacher answers, where the pictures or latents that are linked are noised")
    choice = choose(job.file_name, filled, job.resume, config, identity)
    if choice.notice:
        logger.info(choice.notice)
        progress.noted(choice.notice)
    if not choice.trains:
        return as_it_is(choice, config, progress)
    run = choice.run or new_run(job.file_name, filled)
    with opened(run) as directory:
        encodings.folder = run.folder / ENCODED
        dataset = encode(
            for_model(job.items, model),
            host,
            resolution=resolution,
            style_phrase=config.style_phrase,
            caption_mode=job.caption_mode,
            caption_dropout=config.caption_dropout,
            prior_share=job.prior_share,
            seed=config.seed,
            progress=progress.encoded,
        )
        painter = painter_of(sockets, job, host, progress)
        latent = dataset.examples[0].latent
        progress.opened(directory, config.sample_prompts, style_window(config.density, tokens_of(latent, model)))
        encoders = [socket.patcher for socket in (sockets.clip, sockets.vae) if socket is not None]
        leave_device(*encoders)  # nothing needs them but sample pictures the VAE

        answers = job.teacher and ask_teacher(job.teacher, host, dataset, config, run, identity, progress)

        def trains(saving: Saving) -> TrainResult:
            if painter:
                draw_before(painter, directory, config, progress)
            report = reporter(run, job.config, job.save_intermediate, progress)
            if start:
                progress.noted(start.said)
            return _train(sockets, job, host, dataset, directory, identity, report, painter, saving, start, answers)

        with published_if_stopped(run, config.steps):
            training = Training(model, sockets.clip, host, dataset, config, run.folder, progress)
            result = train_within_memory(training, lambda: try_once(host, dataset), trains)
        with kept(directory):
            path = publish(directory.adapter, run.stem, finished=True)
        if answers is not None:
            answers.forget()
    if cleared := clear_states(job.file_name, job.keep_checkpoints):
        progress.noted(f"{', '.join(cleared)} cannot be trained further any longer (keep_checkpoints)")
    logger.info("trained %d steps, saved %s", result.steps_done, path)
    also = f"; {describe(sockets.clip)} trained, too" if host.text_encoders else ""
    progress.finished(f"{result.steps_done} steps, saved {path.name}{also}")
    samples = find_samples(directory.samples, config.sample_prompts, until=config.steps)
    return TrainedAdapter(read_tensors(path), result.losses, path, run.folder, samples, progress.ui())


def painter_of(sockets: Sockets, job: Job, host: Host, progress: TrainingProgress) -> Painter | None:
    """What draws the sample pictures, None where none are asked for. ValueError for a prompt that cannot be encoded.

    Their prompts are encoded now: loading the text encoder later could push the model out of the device's memory.
    """
    if not (job.config.sample_every and job.config.sample_prompts):
        return None
    assert sockets.clip is not None and sockets.vae is not None, "require_sockets asked for them"
    brush = job.brush.sized(host.resolution, host.pixels_per_token, host.name)
    positives = [conditioning_of(sockets.clip, prompt) for prompt in sample_prompts(job)]
    before = Subject(positives, conditioning_of(sockets.clip, job.negative))
    denoiser = host.denoiser
    assert isinstance(denoiser, ComfyDenoiser), "comfy_host makes one"

    def subject() -> Subject:
        if denoiser.prompts.lasting:
            return before
        clip = resident(sockets.clip)  # now an adapter is on it, and it is loaded
        positives = [conditioning_of(clip, prompt) for prompt in sample_prompts(job)]
        return Subject(positives, conditioning_of(clip, job.negative))

    return Painter(sockets.model, sockets.vae, subject, brush, progress)


def tokens_of(latent: Tensor, model: comfy.model_patcher.ModelPatcher) -> int:
    """Image tokens of a latent (c, h, w)."""
    return latent.shape[-2] * latent.shape[-1] // latents_per_token(model) ** 2


def words_of(
    model: comfy.model_patcher.ModelPatcher, style_phrase: str, resolution: int, seed: int, adapter: AdapterConfig
) -> dict[str, str]:
    """The placeholders of a file name that are ours, and ComfyUI's for the size of a picture."""
    side = str(resolution)
    return {
        "style": style_phrase,
        "model": model_name(model),
        "method": adapter.method,
        "rank": str(adapter.rank),
        "seed": str(seed),
        "width": side,
        "height": side,
    }


def _train(
    sockets: Sockets,
    job: Job,
    host: Host,
    dataset: Dataset,
    run: RunDirectory,
    identity: Mapping[str, Any],
    report: Callable[[Event], None],
    painter: Painter | None,
    saving: Saving,
    start: Start | None,
    answers: Answers | None,
) -> TrainResult:
    config = job.config
    return train(
        host.denoiser,
        dataset,
        config,
        run_dir=run,
        report=report,
        check=raise_if_interrupted,
        sample=painter and partial(draw, painter, sockets.vae),
        device=host.device,
        latents_per_token=latents_per_token(sockets.model) ** 2,
        conditioning=host.training_conditioning,
        base_model=model_name(sockets.model),
        unet_layers=host.unet_layers,
        text_encoders=host.text_encoders,
        text_device=None if sockets.clip is None else sockets.clip.patcher.load_device,
        identity=identity,
        saving=saving,
        start=start,
        answers=answers,
    )


def sample_prompts(job: Job) -> list[str]:
    """What is drawn while training: the user's prompts, in the style's own words.

    A prompt that names one of several styles stays as it is; otherwise the first style's phrase is added.
    """
    phrase = job.config.style_phrase
    others = {item.concept.style_phrase for item in job.items if item.concept.role == STYLE} - {None, "", phrase}

    def complete(prompt: str) -> str:
        named = any(contains(prompt, other) for other in others if other)
        return styled(prompt, phrase) if phrase and not named else prompt

    return [complete(prompt) for prompt in job.config.sample_prompts]
