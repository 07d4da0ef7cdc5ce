"""Distilling a one-step student from a frozen model and prompts, as one loop.

SwiftBrush (arXiv 2312.05239) with PG-SB's random guidance (arXiv 2412.02687), or DMD's convention: see
:mod:`..distillation`. One frozen network serves as teacher, student and fake: the latter two are adapters on it.

Everything drawn is a function of (seed, step) and drawn for a whole step, so that a continued run repeats exactly, and
so that a step is the same whether its samples come in one batch, in several, or on several processes.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attach import Adapter
from ..data.prompts import Encode, Prompts
from ..denoiser import Conditioning, TimedDenoiser
from ..formats.keys import UNET_LAYERS
from ..formats.parts import require_writing_parts
from ..formats.starting import Start, WholeStart
from ..processes import ALONE, Processes
from .checkpoint import RunDirectory, opened_by_one
from .distil_config import DistilConfig
from .events import Event
from .iteration import Iteration
from .learner import Learner
from .likeness import Likeness
from .meter import Meter
from .networks import FAKE, Against, Worn, in_three_roles
from .optimizers import ELEMENTWISE
from .pairs import Pairs, Schedule
from .pupil import about_student, begun_with, identity_of_run, require_called_alike, subject_of_student
from .recorder import Recorder
from .saving import ALL, Saving
from .score_draws import Draws, Texts
from .share import require_alike, share_of
from .subject import with_weights_at_hand
from .tables import to_table


@dataclass(frozen=True)
class DistilResult:
    """What a finished run gives back."""

    # Of the student, on the CPU in float32, averaged where it is: peft's names, or where all of it learns its own. Of
    # one in parts it is in the first process alone.
    adapter_state: dict[str, Tensor]
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
    start: Start | WholeStart | None = None,  # a student to begin with; None = the teacher
    worn: Worn | None = None,  # an adapter of the teacher's, such as a style; the student's file then has it, too
    likeness: Likeness | None = None,  # of pictures and prompts, which config.clip_weight counts
    schedule: Schedule | None = None,  # that the teacher is sampled by, for pairs; None = evenly spaced times
    against: Against | None = None,  # how negative prompts come into the student; None = as in a diffusers model
    processes: Processes = ALONE,  # that train together: each calls this with the same arguments
    frozen: nn.Module | None = None,  # a copy of the network, where all weights of one in parts are to be trained
) -> DistilResult:
    """Trains a student on a frozen denoiser, which is afterwards what it was before.

    Where ``run_dir`` holds a checkpoint of the same run, continues it, and ends as if it had never stopped. Raises,
    and saves before it does, as :func:`.train.train`.
    """
    require_alike(to_table(config), processes)
    if isinstance(start, WholeStart) and not config.full:
        raise ValueError(f"Got all weights of {start.name} to begin with: a student that is an adapter has others.")
    with processes.together():
        _refuse_what_cannot_work(config, likeness, in_parts=processes.sharded, copied=frozen is not None)
        share = share_of(config, processes)
    require_called_alike(start, denoiser, config)
    device = torch.device(device)
    with ExitStack() as stack:
        run = stack.enter_context(opened_by_one(run_dir, processes, DistilConfig))
        if run is not None and config.full:
            run.adapter = run.path / "student.safetensors"
        with processes.together():
            texts = Texts(encode, conditioning or {}, device)
            draws = Draws(config, latent_size, denoiser.clock, texts)
            first = prompts.drawn(config.seed, 0, config.samples_a_step) + draws.negatives(0)
            texts.of(first)  # refuses what the model does not know
        networks = stack.enter_context(
            in_three_roles(denoiser, config, worn=worn, start=start, against=against, device=device, frozen=frozen)
        )
        student = networks.student
        saving = saving or Saving(frozenset({ALL}) if config.gradient_checkpointing else frozenset())
        for network in {networks.denoiser.module, networks.judge.module}:
            stack.enter_context(saving.applied(network, device))
        taught = Learner(networks.fake, config.fake_rates)
        learner, meter = Learner(student, config.student_rates, {FAKE: taught}), Meter()
        counts = likeness if config.clip_weight else None
        about = replace(
            about_student(denoiser, config), base_model=base_model, unet_layers=unet_layers, resolution=resolution
        )
        known = {**identity_of_run(denoiser, prompts, start, worn, counts), **(identity or {})}
        subject = subject_of_student(networks, known, begun_with(about, prompts, start or worn))
        require_alike(subject.identity, processes)
        if isinstance(student, Adapter):
            subject = with_weights_at_hand(subject, student, processes)
        recorder = Recorder(run, learner, meter, config, subject=subject, device=device, processes=processes)
        stack.enter_context(recorder.saving_on_exceptions())
        recorder.catch_up(sample)
        pairs = Pairs(config, networks, draws, schedule)
        iteration = Iteration(
            config=config,
            networks=networks,
            draws=draws,
            pairs=pairs,
            learner=learner,
            taught=taught,
            meter=meter,
            share=share,
            processes=processes,
            device=device,
            check=check,
            likeness=counts,
        )
        while learner.step < config.steps:
            chosen = prompts.drawn(config.seed, pairs.place(learner.step), config.samples_a_step)
            iteration.run(learner.step, chosen)
            recorder.observe(report, sample)
        path = run.adapter if run else None
        state = learner.result(kept=processes.writes or not learner.in_parts)
        return DistilResult(state, recorder.history, learner.losses, learner.step, path)


def _refuse_what_cannot_work(config: DistilConfig, likeness: Likeness | None, *, in_parts: bool, copied: bool) -> None:
    if config.clip_weight and likeness is None:
        raise ValueError(f"Got clip_weight={config.clip_weight} and nothing that compares pictures with texts.")
    if config.full and in_parts:
        if not copied:
            raise ValueError("Got full for a model in parts (FSDP2), and no frozen copy of it.")
        require_writing_parts()
        if config.optimizer not in ELEMENTWISE:
            raise ValueError(
                f"Got optimizer={config.optimizer!r} and full for a model in parts (FSDP2), of which no process sees "
                f"all weights: expected one of {', '.join(sorted(ELEMENTWISE))}."
            )
