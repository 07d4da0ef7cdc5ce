"""The batches of a run with their noise levels and noise: a function of (seed, step, sample), whoever asks for them."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..denoiser import Conditioning, Denoiser
from ..densities import Density, mean_time
from ..density_presets import build_density, preset_name
from ..density_words import in_words
from ..noise import gaussian
from ..randomness import generator
from .config import TrainConfig
from .passes import Noised
from .share import Share

logger = logging.getLogger(__name__)

Law = Callable[[int], Density]  # image tokens of a picture -> the law of its noise level


@dataclass(frozen=True)
class Place:
    """Where in a run a batch is."""

    step: int
    micro: int  # which batch of the step
    uniforms: Tensor  # of the whole step's samples
    share: Share

    def first(self, batch_size: int) -> int:
        """The batch's first sample, in the step."""
        return self.micro * batch_size + self.share.rows.start


def noised_batch(
    batch: Batch,
    place: Place,
    config: TrainConfig,
    law: Law,
    latents_per_token: int,
    conditioning: Conditioning,  # entries (1, …) that every batch gets
    device: torch.device,
) -> tuple[Noised, Tensor]:
    """A batch and what is drawn for it, on the device, and its log_snr (b,) on the CPU."""
    first = place.first(config.batch_size)
    u = place.uniforms[first : first + place.share.batch_size]
    drawn = law(tokens_of(batch.latents, latents_per_token)).icdf(u)
    noise = _noise(batch.latents.shape, config, place.step, first)
    x0, log_snr, eps = (moved(tensor, device) for tensor in (batch.latents, drawn, noise))
    mask = None if batch.mask is None else moved(batch.mask, device)
    conditions = _conditions(batch.conditioning, conditioning, len(x0), device)
    return Noised(x0, log_snr, eps, mask, conditions, moved(batch.weights, device), batch.of_base), drawn


def law_of(denoiser: Denoiser, config: TrainConfig) -> Law:
    """The law of log_snr for pictures of so many image tokens, said in the log once for each number."""

    @cache
    def law(tokens: int) -> Density:
        density = build_density(config.density, denoiser.log_snr_range, tokens)
        words = in_words(density.describe(), preset_name(asdict(config.density)))
        logger.info("noise levels: %s; at %d tokens, mean time %.3f", words, tokens, mean_time(density))
        return density

    return law


def tokens_of(latents: Tensor, latents_per_token: int) -> int:
    """Image tokens of each picture of latents (…, h, w)."""
    return latents.shape[-2] * latents.shape[-1] // latents_per_token


def _noise(shape: torch.Size, config: TrainConfig, step: int, first: int) -> Tensor:
    """eps (b, c, h, w) in float32, drawn on the CPU: the same on every device. ``first`` is the place in the step."""
    places = range(first, first + shape[0])
    sources = [generator(config.seed, "noise", step, place) for place in places]
    return torch.cat([gaussian((1, *shape[1:]), source, offset=config.offset_noise) for source in sources])


def _conditions(batch: Conditioning, more: Conditioning, size: int, device: torch.device) -> dict[str, Tensor]:
    """A batch's conditioning (b, …) with further entries (1, …) repeated for each of its rows."""
    repeated = {name: tensor.expand(size, *tensor.shape[1:]) for name, tensor in more.items()}
    return {name: moved(tensor, device) for name, tensor in {**batch, **repeated}.items()}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. From pinned memory, because a copy from any other waits for the step before."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
