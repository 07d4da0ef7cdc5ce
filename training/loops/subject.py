"""What a run trains, and on what: what tells it from another run, and what its adapter's file says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attach import Adapter, Part
from ..adapters.methods import READS_WEIGHTS
from ..adapters.stand_in import base_weight
from ..adapters.targets import TEXT_TARGETS
from ..adapters.whole import Whole
from ..data.dataset import Dataset
from ..denoiser import Denoiser
from ..densities import Density
from ..formats.metadata import AdapterMetadata
from ..formats.starting import Start
from ..formats.styles import Weights
from ..processes import Processes
from .config import TrainConfig, config_to_table


@dataclass(frozen=True)
class Subject:
    identity: Mapping[str, Any]  # besides the configuration; a run continues only where it is the same
    about: AdapterMetadata  # but for the steps
    weights: Weights  # of the frozen layers under an adapter, by name
    whole: Whole | None = None  # where all weights learn


def parts_of(
    denoiser: Denoiser,
    config: TrainConfig,
    text_encoders: Mapping[str, nn.Module],
    *,
    device: torch.device | None = None,
    text_device: torch.device | None = None,
) -> list[Part]:
    """What the adapter is on: the network, and the text encoders where they are trained, too.

    ``text_encoders`` by the beginnings of their layers' names. ValueError where a rate is given and there are none.
    """
    parts = [Part(denoiser.module, denoiser.family, config.adapter.targets, device=device)]
    if not config.text_encoder_learning_rate:
        return parts
    if not text_encoders:
        raise ValueError(
            f"Got text_encoder_learning_rate={config.text_encoder_learning_rate} for a {denoiser.family} model without "
            "a CLIP text encoder that can be trained: expected 0."
        )
    patterns = TEXT_TARGETS[config.text_encoder_targets]
    return parts + [Part(module, "clip", patterns, prefix, text_device) for prefix, module in text_encoders.items()]


def subject_of(
    denoiser: Denoiser,
    adapter: Adapter,
    dataset: Dataset,
    config: TrainConfig,
    *,
    density: Density,
    base_model: str,
    unet_layers: int,
    identity: Mapping[str, Any] | None = None,
    start: Start | None = None,
) -> Subject:
    """The subject of a run whose adapter is in place. ``identity``: None = :func:`identity_of`."""

    def weights(name: str) -> Tensor:
        return base_weight(adapter.layer(name))

    pictures = dataset.pictures
    about = replace(_about(denoiser, config, pictures, density, base_model), unet_layers=unet_layers)
    identity = identity_of(denoiser, dataset) if identity is None else identity
    if start is not None:
        about, identity = replace(about, started_from=start.name), {**identity, "start": start.digest}
    return Subject(
        identity=identity,
        about=about,
        weights=weights,
    )


def with_weights_at_hand(subject: Subject, adapter: Adapter, processes: Processes) -> Subject:
    """The subject of a model in parts, which the files of some methods need the frozen weights of.

    They are put together once, in the main memory of the process that writes: files can be written without the others.
    """
    if not processes.sharded or adapter.config.method not in READS_WEIGHTS:
        return subject
    kept = {}
    for name in adapter.names:
        stored = next(adapter.layer(name).get_base_layer().parameters())
        weight = subject.weights(name)
        if processes.writes:
            kept[name] = weight.to("cpu", stored.dtype)
    return replace(subject, weights=kept.__getitem__)


def identity_of(denoiser: Denoiser, dataset: Dataset) -> dict[str, Any]:
    """What tells a run from another with the same options: the kind of model, and the encoded data."""
    data = {"pictures": len(dataset.examples), "fingerprint": dataset.fingerprint()}
    return {"model": kind_of(denoiser), "data": data}


def kind_of(denoiser: Denoiser) -> dict[str, str]:
    """What a model is, whatever its weights."""
    return {"family": denoiser.family, "process": denoiser.process, "prediction": denoiser.prediction}


def _about(
    denoiser: Denoiser, config: TrainConfig, pictures: int, density: Density, base_model: str
) -> AdapterMetadata:
    adapter = config.adapter
    return AdapterMetadata(
        family=denoiser.family,
        method=adapter.method,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=(adapter.targets,) if isinstance(adapter.targets, str) else adapter.targets,
        base_model=base_model,
        style_phrase=config.style_phrase,
        process=denoiser.process,
        prediction=denoiser.prediction,
        density=density.describe(),
        seed=config.seed,
        images=pictures,
        resolution=config.resolution,
        learning_rate=config.learning_rate,
        optimizer=config.optimizer,
        training=config_to_table(config),
        options=adapter.options,
    )
