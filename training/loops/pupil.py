"""What a distillation's student is to files and checkpoints."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..adapters.stand_in import base_weight
from ..adapters.whole import Whole
from ..clocks import LOG_SNR
from ..data.prompts import Prompts
from ..denoiser import TimedDenoiser
from ..formats.metadata import FULL, AdapterMetadata
from ..formats.starting import Start, WholeStart
from ..one_step_presets import one_step_of, restated, told_apart
from .distil_config import DistilConfig
from .likeness import Likeness
from .networks import Networks, Worn
from .subject import Subject, kind_of
from .tables import to_table


def subject_of_student(networks: Networks, identity: Mapping[str, Any], about: AdapterMetadata) -> Subject:
    student = networks.student
    if isinstance(student, Whole):
        return Subject(identity, about, weights=networks.denoiser.module.get_parameter, whole=student)
    return Subject(identity, about, weights=lambda name: base_weight(student.layer(name)))


def identity_of_run(
    denoiser: TimedDenoiser,
    prompts: Prompts,
    start: Start | WholeStart | None,
    worn: Worn | None,
    likeness: Likeness | None,
) -> dict[str, Any]:
    """What tells a run from another with the same options."""
    found: dict[str, Any] = {"model": kind_of(denoiser), "prompts": prompts.fingerprint()}
    found |= {} if start is None else {"start": start.digest}
    found |= {} if worn is None else {"teacher": worn.digest}
    return found | ({} if likeness is None else {"likeness": likeness.features.name})


def about_student(denoiser: TimedDenoiser, config: DistilConfig) -> AdapterMetadata:
    """What the file says of the student, but for where it comes from."""
    adapter, targets = config.adapter, config.adapter.targets
    return AdapterMetadata(
        family=denoiser.family,
        method=FULL if config.full else adapter.method,
        rank=1 if config.full else adapter.rank,
        alpha=None if config.full else adapter.alpha,
        targets=() if config.full else (targets,) if isinstance(targets, str) else targets,
        process=denoiser.process,
        prediction=denoiser.prediction,
        seed=config.seed,
        learning_rate=config.learning_rate,
        optimizer=config.optimizer,
        title="One-step student",
        training=to_table(config),
        one_step=one_step_of(denoiser.clock, denoiser.prediction, config.time),
    )


def require_called_alike(start: Start | WholeStart | None, denoiser: TimedDenoiser, config: DistilConfig) -> None:
    """ValueError for a student to begin with that is called at another time, at which it alone draws."""
    if start is None or not start.one_step:
        return
    said, ours = start.one_step, one_step_of(denoiser.clock, denoiser.prediction, config.time)
    said = restated(said, denoiser.clock) if ours["unit"] == LOG_SNR else said
    if differing := told_apart(said, ours):
        what, before, now = differing
        raise ValueError(
            f"{start.name} is a one-step student whose {what} is {before}, and with time={config.time:g} "
            f"this run's is {now}: it would draw noise. State the time that it was trained for, or begin "
            "with another"
        )


def begun_with(about: AdapterMetadata, prompts: Prompts, begun: Start | WholeStart | Worn | None) -> AdapterMetadata:
    """With the style of the prompts, and what the student began with."""
    return replace(about, style_phrase=prompts.style_phrase, started_from=begun.name if begun else "")
