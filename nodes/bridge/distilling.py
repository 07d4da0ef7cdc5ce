"""A distillation inside ComfyUI: a teacher and prompts in, a one-step student in models/loras out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ...training.adapters.attach import layers_to_adapt
from ...training.data.dataset import Dataset, Example
from ...training.data.prompts import Prompts, read_line
from ...training.formats.starting import Start
from ...training.hosts.host import Host
from ...training.loops.checkpoint import RunDirectory
from ...training.loops.config import MEMORY, TrainConfig
from ...training.loops.distil import DistilResult, distil
from ...training.loops.distil_config import DistilConfig
from ...training.loops.events import Event
from ...training.loops.networks import Worn
from ...training.loops.pupil import require_called_alike
from ...training.loops.samples import find_samples
from ...training.loops.saving import Saving
from ...training.loops.subject import kind_of
from ...training.one_step_presets import one_step_of
from .adapters import read_tensors
from .against import check_hook, negatives_inside
from .board import Address
from .denoiser import ComfyDenoiser
from .distil_prompts import MOST, encode_before, few, own_negatives
from .encodings import Encodings
from .families import model_name, other_side
from .files import adapter_pattern
from .host import comfy_host
from .identity import digest_of_clip, what_acts
from .memory import Training, leave_device, train_within_memory
from .noise_levels import levels_of, noise_levels
from .one_step_levels import schedule, sigma_of
from .outcome import TrainedAdapter, as_it_is, kept, published_if_stopped, reporter
from .previews import TrainingProgress
from .prompts import GUIDANCE, conditioning_of
from .publishing import publish
from .resuming import AUTOMATIC
from .runs import ENCODED, choose, clear_states, new_run, opened
from .sample_pictures import draw, draw_before
from .sampling import Brush, Painter, Subject
from .session import raise_if_interrupted, training_session, without_float16
from .starting import refuse_windowed, try_once
from .student_start import student_start, undressed
from .students import refuse_as_teacher
from .training import words_of

logger = logging.getLogger(__name__)

TEACHER = "teacher"  # what the sample pictures of step 0 are called


@dataclass(frozen=True)
class DistilSockets:
    """The user's models, loaded by whatever nodes."""

    teacher: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE | None  # None where no sample pictures are drawn
    student: comfy.model_patcher.ModelPatcher | None = None  # the teacher with a student's LoRA, to begin with


@dataclass(frozen=True)
class DistilJob:
    """What a node asks for."""

    prompts: Prompts
    config: DistilConfig
    resolution: int  # side in pixels of the student's square pictures
    file_name: str  # pattern under models/loras
    brush: Brush  # of the sample pictures; its steps and CFG are the teacher's
    negative: str = ""  # of the teacher's sample pictures
    style_phrase: str = ""  # for the file name
    guidance: float = 3.5  # that FLUX.1-dev and its kin are told
    memory: str = MEMORY[0]
    resume: str = AUTOMATIC  # one of RESUME
    save_intermediate: bool = False  # the student of every checkpoint goes to models/loras too
    keep_checkpoints: int = 3  # of this file name's finished runs, the newest that can be trained further


def distil_student(sockets: DistilSockets, job: DistilJob, address: Address | None = None) -> TrainedAdapter:
    """Distils, and saves the student under a free name. The models are afterwards what they were.

    Runs are continued, kept and published as those of :func:`.training.train_adapter`.
    """
    progress = TrainingProgress(job.config.steps, address, first=TEACHER)
    with progress.watched():
        return _run(sockets, job, progress)


def _run(sockets: DistilSockets, job: DistilJob, progress: TrainingProgress) -> TrainedAdapter:
    config = job.config
    teacher = without_float16(sockets.teacher, getattr(torch, config.precision))
    sockets = replace(sockets, teacher=teacher)
    words = words_of(teacher, job.style_phrase, job.resolution, config.seed, config.adapter)
    filled = adapter_pattern(job.file_name, words)
    refuse_windowed(teacher)
    refuse_as_teacher(teacher)
    _require_vae(sockets, config)
    encodings = Encodings()
    base, worn, note = undressed(teacher, config.adapter)
    host = _host(replace(sockets, teacher=base), job, encodings)
    denoiser = denoiser_of(host)
    start = student_start(base, sockets.student, config.adapter)
    require_called_alike(start, denoiser, config)
    identity = _identity(sockets, job, denoiser, start)
    choice = choose(job.file_name, filled, job.resume, config, identity)
    if choice.notice:
        logger.info(choice.notice)
        progress.noted(choice.notice)
    if not choice.trains:
        return as_it_is(choice, config, progress)
    for said in (note, start.said if start else "", *_doubts(sockets, job)):
        if said:
            progress.noted(said)
    run = choice.run or new_run(job.file_name, filled, DistilConfig)
    with opened(run) as directory:
        encodings.folder = run.folder / ENCODED
        prompts = encode_before(host, job.prompts, config, progress)
        if config.negative_prompts:
            check_hook(base, denoiser.prompts, read_line(config.negative_prompts[0]).prompt(0))
        painters = _painters(sockets, job, host, progress)
        progress.opened(directory, config.sample_prompts)
        leave_device(*(socket.patcher for socket in (sockets.clip, sockets.vae) if socket is not None))
        report = reporter(run, config, job.save_intermediate, progress)

        def trains(saving: Saving) -> DistilResult:
            return _distil(sockets, job, host, directory, identity, report, painters, saving, start, worn)

        with published_if_stopped(run, config.steps):
            if painters:
                _draw_before(sockets.teacher, host, painters[0], directory, job, progress)
            nothing = Dataset([_example(host, job.resolution, prompts)], None)
            asked = None if few(job.prompts, config) else MOST
            planned = Training(
                base, sockets.clip, host, nothing, _as_training(job), run.folder, progress, kept_prompts=asked
            )
            result = train_within_memory(planned, lambda: try_once(host, nothing), trains)
        with kept(directory):
            path = publish(directory.adapter, run.stem, finished=True)
    if cleared := clear_states(job.file_name, job.keep_checkpoints, DistilConfig):
        progress.noted(f"{', '.join(cleared)} cannot be trained further any longer (keep_checkpoints)")
    logger.info("distilled %d steps, saved %s", result.steps_done, path)
    progress.finished(f"{result.steps_done} steps, saved {path.name}")
    samples = find_samples(directory.samples, config.sample_prompts, until=config.steps)
    return TrainedAdapter(read_tensors(path), result.losses, path, run.folder, samples, progress.ui())


def _doubts(sockets: DistilSockets, job: DistilJob) -> list[str]:
    """What can be meant, and more often is not."""
    return [other_side(sockets.teacher, job.resolution), own_negatives(job.prompts, job.config)]


def _require_vae(sockets: DistilSockets, config: DistilConfig) -> None:
    if sockets.vae is None and config.sample_every and config.sample_prompts:
        raise ValueError(
            "link the model's VAE to 'vae': it is needed to draw sample pictures (or set sample_every to 0)"
        )


def _host(sockets: DistilSockets, job: DistilJob, encodings: Encodings) -> Host:
    """The teacher's. ValueError for a size that it does not draw, and for layers that cannot be adapted."""
    host = comfy_host(sockets.teacher, sockets.clip, sockets.vae, resolution=job.resolution, encodings=encodings)
    side, multiple, config = job.resolution, host.pixels_per_token, job.config
    if side % multiple:
        raise ValueError(f"resolution is {side}: {host.name} draws multiples of {multiple} pixels")
    denoiser = denoiser_of(host)
    one_step_of(denoiser.clock, denoiser.prediction, config.time)  # refuses a model whose time has no name
    layers_to_adapt(denoiser.module, config.adapter, family=denoiser.family)
    told = {GUIDANCE: torch.tensor([job.guidance])} if GUIDANCE in host.training_conditioning else {}
    return replace(host, training_conditioning=told)


def denoiser_of(host: Host) -> ComfyDenoiser:
    """The host's denoiser, with what ComfyUI's has more."""
    assert isinstance(host.denoiser, ComfyDenoiser), "comfy_host makes one"
    return host.denoiser


def _identity(sockets: DistilSockets, job: DistilJob, denoiser: ComfyDenoiser, start: Start | None) -> dict[str, Any]:
    """What a run is recognised by besides its options."""
    return {
        "model": {**kind_of(denoiser), **what_acts(sockets.teacher)},
        "encoders": {"clip": digest_of_clip(sockets.clip)},
        "prompts": job.prompts.fingerprint(),
        "resolution": job.resolution,
        "guidance": job.guidance,
        **({"start": start.digest} if start else {}),
    }


def _painters(
    sockets: DistilSockets, job: DistilJob, host: Host, progress: TrainingProgress
) -> tuple[Painter, Painter] | None:
    """What draws as the teacher, and what draws as the student. None where no pictures are asked for."""
    config, vae = job.config, sockets.vae
    if vae is None or not (config.sample_every and config.sample_prompts):
        return None
    brush = job.brush.sized(job.resolution, host.pixels_per_token, host.name)

    def told(prompt: str) -> list:
        more = {name: float(value) for name, value in host.training_conditioning.items()}
        return [[text, {**rest, **more}] for text, rest in conditioning_of(sockets.clip, prompt)]

    subject = Subject([told(prompt) for prompt in config.sample_prompts], told(job.negative))
    denoiser, sampling = denoiser_of(host), sockets.teacher.get_model_object("model_sampling")
    called = one_step_of(denoiser.clock, denoiser.prediction, config.time)
    sigma = sigma_of(sampling, noise_levels(sockets.teacher), called["level"], called["unit"])
    teacher = Painter(sockets.teacher, vae, lambda: subject, brush, progress)
    return teacher, Painter(denoiser.model, vae, lambda: subject, brush, progress, sigma)


def _draw_before(
    teacher: comfy.model_patcher.ModelPatcher,
    host: Host,
    painter: Painter,
    run: RunDirectory,
    job: DistilJob,
    progress: TrainingProgress,
) -> None:
    """The teacher's pictures, with the LoRAs that it wears."""
    side = job.resolution // host.pixels_per_latent
    with training_session(teacher, memory_required=teacher.memory_required([1, host.latent_channels, side, side])):
        draw_before(painter, run, job.config, progress)


def _example(host: Host, side: int, prompts: list[str]) -> Example:
    """A picture of nothing, of the size and with the longest prompt, for the plan of memory."""
    latent = torch.zeros(host.latent_channels, side // host.pixels_per_latent, side // host.pixels_per_latent)
    rows = [host.encode_prompts([prompt]) for prompt in prompts]
    return Example("a picture", latent, denoiser_of(host).longest(rows), None, "")


def _as_training(job: DistilJob) -> TrainConfig:
    """A training that takes as much memory: of an adapter as large as the student's and the fake's together.

    Of one step, so that no time is foretold: a step of distillation is another.
    """
    config = job.config
    return TrainConfig(
        steps=1,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        learning_rate=config.learning_rate,
        optimizer=config.optimizer,
        ema_decay=config.ema_decay,
        precision=config.precision,
        gradient_checkpointing=config.gradient_checkpointing,
        memory=job.memory,
        adapter=replace(config.adapter, rank=config.adapter.rank + config.fake_rank),
    )


def _distil(
    sockets: DistilSockets,
    job: DistilJob,
    host: Host,
    run: RunDirectory,
    identity: dict[str, Any],
    report: Callable[[Event], None],
    painters: tuple[Painter, Painter] | None,
    saving: Saving,
    start: Start | None,
    worn: Worn | None,
) -> DistilResult:
    denoiser, side = denoiser_of(host), job.resolution // host.pixels_per_latent

    def levels(steps: int) -> Tensor:
        """ComfyUI's simple schedule."""
        sampling = sockets.teacher.get_model_object("model_sampling")
        return levels_of(sampling).log_snr(torch.tensor([*schedule(sampling, steps), 0.0]))

    with negatives_inside(denoiser) as against:
        return distil(
            denoiser,
            job.prompts,
            host.encode_prompts,
            job.config,
            latent_size=(host.latent_channels, side, side),
            run_dir=run,
            report=report,
            check=raise_if_interrupted,
            sample=painters and partial(draw, painters[1], sockets.vae),
            device=host.device,
            conditioning=host.training_conditioning,
            base_model=model_name(sockets.teacher),
            unet_layers=host.unet_layers,
            resolution=job.resolution,
            identity=identity,
            saving=saving,
            start=start,
            worn=worn,
            against=against,
            schedule=levels,
        )
