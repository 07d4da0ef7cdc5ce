"""Training an adapter, as one loop.

Style-Friendly SNR Sampler (arXiv 2411.14793): draw log_snr ~ N(mu, sigma^2) (Eq. 6), mix x_t = alpha x0 + sigma eps,
and minimise the plain mean square between the model's prediction and its target (Eq. 3).

Everything drawn is a function of (seed, step, sample), so that a continued run repeats exactly, and so that a step
is the same whether its samples come in one batch or in several.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..adapters.attach import attached_to_parts
from ..data.concepts import BASE
from ..data.dataset import Dataset
from ..denoiser import Conditioning, Denoiser
from ..densities import stratified_uniform
from ..formats.keys import UNET_LAYERS
from ..formats.starting import Start
from ..processes import ALONE, Processes
from ..randomness import generator
from ..weightings import check_weighting
from .checkpoint import RunDirectory, opened_by_one
from .config import TrainConfig, config_to_table
from .events import Event
from .learner import Learner
from .meter import Meter
from .noising import Place, law_of, moved, noised_batch, tokens_of
from .passes import learn_from
from .recorder import Recorder
from .saving import Saving, as_configured
from .share import require_alike, share_of
from .subject import parts_of, subject_of, with_weights_at_hand

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run gives back."""

    adapter_state: dict[str, Tensor]  # peft's names, float32 on the CPU; averaged weights where there are any
    history: list[Event]  # of all sessions of the run, without images
    losses: list[float]  # mean of each optimizer step
    steps_done: int
    path: Path | None  # of the adapter's file


def train(
    denoiser: Denoiser,
    dataset: Dataset,
    config: TrainConfig,
    *,
    run_dir: Path | RunDirectory | None,  # a folder, or one that is open already; None = nothing is kept on disk
    report: Callable[[Event], None] | None = None,  # what it raises stops the run, which is saved first
    check: Callable[[], None] | None = None,  # called before every batch; what it raises does the same
    sample: Callable[[int], Tensor | None] | None = None,  # step -> pictures (b, 3, h, w) in [0, 1], or none
    device: torch.device | str = "cpu",
    latents_per_token: int = 4,  # positions of a latent to an image token
    conditioning: Conditioning | None = None,  # entries (1, …) that every batch gets too: FLUX-dev's guidance of 1
    base_model: str = "",  # its name, for the adapter's file
    unet_layers: int = UNET_LAYERS,  # residual layers a level, where it is a UNet
    saving: Saving | None = None,  # what is done to save memory; None = as the configuration says
    identity: Mapping[str, Any] | None = None,  # what a run is recognised by besides its options; None = identity_of
    start: Start | None = None,  # an adapter to begin with; None = one that does nothing yet
    text_encoders: Mapping[str, nn.Module] = MappingProxyType({}),  # that the denoiser runs, by their layers' prefix
    text_device: torch.device | None = None,  # where they compute; None = where their weights are
    processes: Processes = ALONE,  # that train together: each calls this with the same arguments
    answers: Callable[[Place], Tensor] | None = None,  # what is learned at each batch; None = its pictures
) -> TrainResult:
    """Trains an adapter on a frozen denoiser, which is afterwards what it was before.

    Where ``run_dir`` holds a checkpoint of the same run, continues it, and ends as if it had never stopped: bit for
    bit on one machine. ValueError for what cannot work, before any work; IncompatibleCheckpoint names the options in
    which a checkpoint differs; NonFiniteLoss stops a run that diverges. Whatever is raised, also by ``report`` or
    from within the model, the last complete step is saved before it goes on.
    """
    require_alike(config_to_table(config), processes)
    with processes.together():
        device, share = torch.device(device), share_of(config, processes)
    if processes.sharded and share.parts < processes.count and any(e.role == BASE for e in dataset.examples):
        raise ValueError(
            "Pictures that keep what the base model says take a pass more than others, and of a model in parts all "
            "processes have to be in the same one: set accumulation to 1, and batch_size to a multiple of their number."
        )
    check_weighting(config.weighting, denoiser.prediction, denoiser.process)
    law = law_of(denoiser, config)
    with ExitStack() as stack:
        run = stack.enter_context(opened_by_one(run_dir, processes))
        parts = parts_of(denoiser, config, text_encoders, device=device, text_device=text_device)
        adapter = stack.enter_context(attached_to_parts(parts, config.adapter, seed=config.seed))
        if start is not None:
            adapter.load_state_dict(start.joined(adapter.state_dict()))
            logger.info(start.said)
        saving = saving or as_configured(config)
        for part in parts:
            chosen = saving if part.module is denoiser.module else saving.beside()
            stack.enter_context(chosen.applied(part.module, device))
        learner, meter = Learner(adapter, config), Meter()
        density = law(tokens_of(dataset.examples[0].latent, latents_per_token))
        subject = subject_of(
            denoiser,
            adapter,
            dataset,
            config,
            density=density,
            base_model=base_model,
            unet_layers=unet_layers,
            identity=identity,
            start=start,
        )
        require_alike(subject.identity, processes)
        subject = with_weights_at_hand(subject, adapter, processes)
        recorder = Recorder(run, learner, meter, config, subject=subject, device=device, processes=processes)
        stack.enter_context(recorder.saving_on_exceptions())
        recorder.catch_up(sample)
        while learner.step < config.steps:
            step = learner.step
            uniforms = stratified_uniform(config.samples_a_step, generator(config.seed, "log_snr", step))
            for micro in share.passes:
                with processes.together():
                    if check is not None:
                        check()
                    place = Place(step, micro, uniforms, share)
                    batch = dataset.batch(config.seed, step, micro, config.batch_size, config.accumulation, share.rows)
                noised, drawn = noised_batch(batch, place, config, law, latents_per_token, conditioning or {}, device)
                if answers is not None:
                    noised = replace(noised, wanted=moved(answers(place), device))
                source = generator(config.seed, "dropout", step, micro, *share.part)
                with processes.passing():
                    losses = learn_from(noised, denoiser, adapter, config, source)
                meter.add(step, batch.captions, drawn, losses)

            processes.sum_gradients(learner.parameters, share.parts)
            meter.add_norm(step, clip_grad_norm_(learner.parameters, config.clip_norm or math.inf))
            if device.type == "cpu":  # elsewhere the recorder looks: here it would make every step wait
                with processes.together():
                    meter.check(step)
            with learner.updating():
                learner.optimizer.step()
                learner.schedule.step()
                learner.optimizer.zero_grad()
                learner.average.update()
            recorder.observe(report, sample)
        return TrainResult(
            learner.result(), recorder.history, learner.losses, learner.step, run.adapter if run else None
        )
