"""Distilling a one-step student from a frozen model and prompts, as one loop.

SwiftBrush (arXiv 2312.05239) with PG-SB's random guidance (arXiv 2412.02687), or DMD's convention: see
:mod:`..distillation`. One frozen network serves as teacher, student and fake: the latter two are adapters on it.

Everything drawn is a function of (seed, step) and drawn for a whole step, so that a continued run repeats exactly, and
so that a step is the same whether its samples come in one batch, in several, or on several processes.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..adapters.attach import attached_together
from ..adapters.stand_in import base_weight
from ..clocks import Clock, log_snr_at
from ..data.prompts import Encode, Prompts
from ..denoiser import Conditioning, TimedDenoiser
from ..densities import stratified_uniform
from ..distillation import DMD, guidance_scales
from ..formats.keys import UNET_LAYERS
from ..formats.metadata import AdapterMetadata
from ..formats.starting import Start
from ..noise import gaussian
from ..one_step_presets import one_step_of
from ..processes import ALONE, Processes
from ..randomness import generator
from .checkpoint import RunDirectory, opened_by_one
from .distil_config import DistilConfig
from .events import Event
from .learner import Learner
from .meter import Meter
from .recorder import Recorder
from .saving import ALL, Saving
from .score_passes import Against, Judged, Networks, gradient, learn_fake, learn_student, pictures
from .share import require_alike, share_of
from .subject import Subject, kind_of, with_weights_at_hand
from .tables import to_table

logger = logging.getLogger(__name__)

STUDENT, FAKE = "student", "fake"


@dataclass(frozen=True)
class DistilResult:
    """What a finished run gives back."""

    adapter_state: dict[str, Tensor]  # of the student: peft's names, float32 on the CPU, averaged where it is
    history: list[Event]
    losses: list[float]  # the student's mean of each step
    steps_done: int
    path: Path | None  # of the student's file


def distil(
    denoiser: TimedDenoiser,
    prompts: Prompts,
    encode: Encode,
    config: DistilConfig,
    *,
    latent_size: tuple[int, int, int],  # channels, height and width of a picture's latent
    run_dir: Path | RunDirectory | None,  # a folder, or one that is open already; None = nothing is kept on disk
    report: Callable[[Event], None] | None = None,  # what it raises stops the run, which is saved first
    check: Callable[[], None] | None = None,  # called before every step; what it raises does the same
    sample: Callable[[int], Tensor | None] | None = None,  # step -> pictures (b, 3, h, w) in [0, 1], or none
    device: torch.device | str = "cpu",
    conditioning: Conditioning | None = None,  # entries (1, …) that every batch gets too
    base_model: str = "",
    unet_layers: int = UNET_LAYERS,
    resolution: int | None = None,  # side in pixels of a square of the same area, for the student's file
    identity: Mapping[str, Any] | None = None,  # what a run is recognised by besides its options and prompts
    saving: Saving | None = None,  # what is done to save memory; None = as the configuration says
    start: Start | None = None,  # a student to begin with; None = the teacher
    against: Against | None = None,  # how negative prompts come into the student; None = as in a diffusers model
    processes: Processes = ALONE,  # that train together: each calls this with the same arguments
) -> DistilResult:
    """Trains a student on a frozen denoiser, which is afterwards what it was before.

    Where ``run_dir`` holds a checkpoint of the same run, continues it, and ends as if it had never stopped. Raises,
    and saves before it does, as :func:`.train.train`.
    """
    require_alike(to_table(config), processes)
    device, share = torch.device(device), share_of(config, processes)
    pieces = config.samples_a_step // share.batch_size  # of a step's batch, over all passes and processes
    with ExitStack() as stack:
        run = stack.enter_context(opened_by_one(run_dir, processes, DistilConfig))
        with processes.together():
            texts = _Texts(encode, conditioning or {}, device)
            texts.of(prompts.drawn(config.seed, 0, config.samples_a_step))  # refuses what the model does not know
        draws = _Draws(config, latent_size, denoiser.clock, texts)
        configs = {STUDENT: config.adapter, FAKE: config.fake}
        adapters = stack.enter_context(
            attached_together(denoiser.module, configs, family=denoiser.family, seed=config.seed, device=device)
        )
        student, fake = adapters[STUDENT], adapters[FAKE]
        if start is not None:
            student.load_state_dict(start.joined(student.state_dict()))
            logger.info(start.said)
        saving = saving or Saving(frozenset({ALL}) if config.gradient_checkpointing else frozenset())
        stack.enter_context(saving.applied(denoiser.module, device))
        networks = Networks(denoiser, student, fake, config.precision, against, device.type)
        taught = Learner(fake, config.fake_rates)
        learner, meter = Learner(student, config.student_rates, {FAKE: taught}), Meter()
        begun = {} if start is None else {"start": start.digest}
        about = replace(_about(denoiser, config), started_from="" if start is None else start.name)
        subject = Subject(
            identity={"model": kind_of(denoiser), "prompts": prompts.fingerprint(), **begun, **(identity or {})},
            about=replace(about, base_model=base_model, unet_layers=unet_layers, resolution=resolution),
            weights=lambda name: base_weight(student.layer(name)),
        )
        require_alike(subject.identity, processes)
        subject = with_weights_at_hand(subject, student, processes)
        recorder = Recorder(run, learner, meter, config, subject=subject, device=device, processes=processes)
        stack.enter_context(recorder.saving_on_exceptions())
        recorder.catch_up(sample)
        call = log_snr_at(denoiser.clock, torch.full((share.batch_size,), config.time)).to(device)
        while learner.step < config.steps:
            step = learner.step
            chosen = prompts.drawn(config.seed, step, config.samples_a_step)
            drawn: list[Tensor] = []  # by the student, for each pass
            for rows in share.of_step:
                with processes.together():
                    if check is not None:
                        check()
                    judged = draws.judged(step, rows, chosen[rows])
                with processes.passing():
                    with networks.acting_as(student):
                        x0 = pictures(networks, draws.noise(step, "student", rows), call, judged)
                    g, apart = gradient(networks, x0.detach(), judged, config.convention)
                    with networks.acting_as(student):
                        losses = learn_student(x0, g)
                drawn.append(x0.detach())
                meter.add(step, tuple(chosen[rows]), judged.log_snr.cpu(), losses)
                meter.note("apart", apart)
            processes.sum_gradients(learner.parameters, pieces)
            meter.add_norm(step, clip_grad_norm_(learner.parameters, config.clip_norm or math.inf))
            if device.type == "cpu":
                with processes.together():
                    meter.check(step)
            with learner.updating():
                _update(learner)
                for update in range(config.fake_updates):
                    for rows, x0 in zip(share.of_step, drawn, strict=True):
                        with processes.passing():
                            lesson = draws.lesson(step, update, rows, chosen[rows])
                            meter.note("fake_loss", learn_fake(networks, x0, *lesson).mean())
                    processes.sum_gradients(taught.parameters, pieces)
                    meter.note("fake_norm", clip_grad_norm_(taught.parameters, config.clip_norm or math.inf))
                    _update(taught)
            recorder.observe(report, sample)
        return DistilResult(
            learner.result(), recorder.history, learner.losses, learner.step, run.adapter if run else None
        )


def _update(learner: Learner) -> None:
    learner.optimizer.step()
    learner.schedule.step()
    learner.optimizer.zero_grad()
    learner.average.update()


class _Texts:
    """Prompts as the network is told them, on the device."""

    def __init__(self, encode: Encode, more: Conditioning, device: torch.device) -> None:
        self._encode, self._more, self._device = encode, more, device
        self._null = encode([""])

    def of(self, prompts: list[str]) -> Conditioning:
        return self._whole(self._encode(prompts), len(prompts))

    def null(self, rows: int) -> Conditioning:
        return self._whole(self._null, rows)

    def _whole(self, conditioning: Conditioning, rows: int) -> Conditioning:
        whole = {**conditioning, **self._more}
        return {name: value.expand(rows, *value.shape[1:]).to(self._device) for name, value in whole.items()}


@dataclass(frozen=True)
class _Draws:
    """What is drawn in a step, for those of its samples that are asked for. On the device."""

    config: DistilConfig
    size: tuple[int, int, int]
    clock: Clock
    texts: _Texts

    def judged(self, step: int, rows: slice, prompts: list[str]) -> Judged:
        config, whole, device = self.config, self.config.samples_a_step, self.texts._device
        times = stratified_uniform(whole, generator(config.seed, "time", step)).float()
        times = config.lowest_time + (config.highest_time - config.lowest_time) * times
        u = torch.rand(whole if config.guidance_by_sample else 1, generator=generator(config.seed, "guidance", step))
        scales = guidance_scales(config.guidance_low, config.guidance_high, u).expand(whole)
        null = self.texts.null(len(prompts))
        return Judged(
            log_snr=log_snr_at(self.clock, times[rows]).to(device),
            eps=self.noise(step, "judge", rows),
            scales=scales[rows].to(device),
            conditioning=self.texts.of(prompts),
            null=null,
            away=self.texts.of(self._negatives(step)[rows]) if config.negative_prompts else null,
            nasa=self._nasa(step) if config.negative_prompts else 0.0,
        )

    def _negatives(self, step: int) -> list[str]:
        return Prompts(self.config.negative_prompts).drawn(
            self.config.seed, step, self.config.samples_a_step, "negative prompts"
        )

    def _nasa(self, step: int) -> float:
        u = torch.rand(1, generator=generator(self.config.seed, "nasa", step))
        return float(guidance_scales(self.config.nasa_low, self.config.nasa_high, u))

    def lesson(self, step: int, update: int, rows: slice, prompts: list[str]) -> tuple[Tensor, Tensor, Conditioning]:
        """Noise, log_snr and conditioning of an update of the fake, some of whose prompts are empty."""
        config, whole = self.config, self.config.samples_a_step
        draw = generator(config.seed, "lesson", step, update)
        share = 0.0 if config.convention == DMD else config.null_share  # the fake is not guided there
        dropped = (torch.rand(whole, generator=draw) < share)[rows]
        told = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        log_snr = log_snr_at(self.clock, stratified_uniform(whole, draw).float()[rows])
        noise = self.noise(step, f"lesson {update}", rows)
        return noise, log_snr.to(self.texts._device), self.texts.of(told)

    def noise(self, step: int, use: str, rows: slice) -> Tensor:
        """Unit noise (b, c, h, w) in float32, drawn on the CPU: the same on every device."""
        shape = (self.config.samples_a_step, *self.size)
        return gaussian(shape, generator(self.config.seed, use, step))[rows].to(self.texts._device)


def _about(denoiser: TimedDenoiser, config: DistilConfig) -> AdapterMetadata:
    adapter = config.adapter
    return AdapterMetadata(
        family=denoiser.family,
        method=adapter.method,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=(adapter.targets,) if isinstance(adapter.targets, str) else adapter.targets,
        process=denoiser.process,
        prediction=denoiser.prediction,
        seed=config.seed,
        learning_rate=config.learning_rate,
        optimizer=config.optimizer,
        title="One-step student",
        training=to_table(config),
        one_step=one_step_of(denoiser.clock, denoiser.prediction, config.time),
    )
