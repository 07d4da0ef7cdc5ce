"""A MODEL as a teacher: what it answers to the batches of a run, before another one is trained to answer so."""

import logging
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher

from ...training.data.dataset import Dataset
from ...training.hosts.host import Host
from ...training.loops.config import TrainConfig
from ...training.loops.teaching import Answers, ask, require_kin
from .denoiser import ComfyDenoiser
from .families import latents_per_token
from .identity import what_acts
from .previews import TrainingProgress
from .runs import Run, answers_of
from .session import training_session

logger = logging.getLogger(__name__)

Patcher = comfy.model_patcher.ModelPatcher


def teacher_identity(teacher: Patcher, model: Patcher, host: Host) -> dict[str, Any]:
    """What a run with this teacher is recognised by. ValueError for one that has nothing to teach to ``model``."""
    require_kin(_denoiser(teacher, host), host.denoiser)
    if what_acts(teacher) == what_acts(model):
        raise ValueError(
            "the teacher is the very model that learns, so that there is nothing to learn: link the fine-tune, or the "
            "model with the LoRAs that are to be learned, as the teacher, and the base as the model"
        )
    return what_acts(teacher)


def ask_teacher(
    teacher: Patcher,
    host: Host,
    dataset: Dataset,
    config: TrainConfig,
    run: Run,
    identity: Mapping[str, Any],
    progress: TrainingProgress,
) -> Answers:
    """The teacher's answers to all batches that are still to come, in the run's folder. It is afterwards what it was.

    Where it is stopped meanwhile, those that are there stay, for the run to go on with.
    """
    answers, stored = answers_of(run, config, identity), run.directory.stored()
    first = 0 if stored is None else stored.step
    shape = [config.batch_size, *max((example.latent for example in dataset.examples), key=lambda x: x.numel()).shape]
    try:
        with training_session(teacher, memory_required=teacher.memory_required(shape)):
            ask(
                _denoiser(teacher, host),
                host.denoiser,
                dataset,
                config,
                answers,
                first=first,
                latents_per_token=latents_per_token(teacher) ** 2,
                conditioning=host.training_conditioning,
                device=host.device,
                progress=progress.taught,
            )
    except BaseException:
        logger.warning("stopped: %d steps of the teacher's answers are kept in %s", len(answers), answers.folder)
        raise
    return answers


def _denoiser(teacher: Patcher, host: Host) -> ComfyDenoiser:
    assert isinstance(host.denoiser, ComfyDenoiser), "comfy_host makes one"
    return ComfyDenoiser(teacher, host.denoiser.prompts)
