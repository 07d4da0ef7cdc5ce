"""Where a picture shows what its prompt names, by the attention of a frozen model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hosts.generate import with_extras
from ..hosts.host import Host
from ..noise import add_noise, gaussian
from ..randomness import generator
from .maps import PATCHES, Joint, Layout, Recorder, contrasted, text_first
from .phrases import places_of

# log_snr: flow times 0.35, 0.5 and 0.65, and on SD's table times 300 to 600 of 1000.
LEVELS = {"flow": (1.24, 0.0, -1.24), "vp": (0.7, -0.6, -1.9), "ve": (0.7, -0.6, -1.9)}


@dataclass(frozen=True)
class Watch:
    """How a host's model is seen. ``open``: inside of it, a recorder sees what the model attends to."""

    open: Callable[[Recorder], AbstractContextManager[object]]
    joint: Joint = text_first  # where picture and text share one attention
    sides: tuple[int, ...] = PATCHES  # of a token in latent pixels there


@dataclass(frozen=True)
class Search:
    """How a picture is looked at. ValueError for a value out of its range."""

    levels: tuple[float, ...] = ()  # log_snr; () = the middle of the model's range, LEVELS
    noises: int = 4  # at each level
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.noises <= 64:
            raise ValueError(f"a picture is looked at with {self.noises} noises a level: expected 1 to 64")


def attention_maps(
    host: Host,
    watch: Watch,
    picture: Tensor,  # (3, h, w) in [0, 1]; h and w are multiples of the host's pixels_per_token
    prompt: str,
    phrases: Sequence[str],
    search: Search = Search(),
    progress: Callable[[int, int], None] | None = None,  # calls of the model done, and in all
) -> Tensor:
    """Maps (phrases, h', w') of latent pixels, in [0, 1]: each less the mean of the others, so that they compete.

    ValueError for a phrase without tokens, and where the model's attention is not seen.
    """
    return contrasted(looked(host, watch, picture, prompt, phrases, search, progress).maps())


@torch.no_grad()
def looked(
    host: Host,
    watch: Watch,
    picture: Tensor,
    prompt: str,
    phrases: Sequence[str],
    search: Search = Search(),
    progress: Callable[[int, int], None] | None = None,
) -> Recorder:
    """What a model attended to at all noise levels and noises of a search. As :func:`attention_maps`."""
    if host.token_ids is None:
        raise ValueError(
            f"which tokens {host.name} attends to is not known: locate by prediction error instead, or give masks"
        )
    texts = host.token_ids
    places = [places_of(texts, prompt, phrase) for phrase in phrases]
    latents = host.encode_images(picture[None].to(host.device)).to(host.device)
    conditioning = with_extras(host.encode_prompts([prompt]), host.training_conditioning)
    conditioning = {name: value.to(host.device) for name, value in conditioning.items()}
    layout = Layout(sum(map(len, texts(prompt))), *latents.shape[-2:], watch.joint, watch.sides)
    recorder, process = Recorder(layout, places), host.denoiser.process
    looks = [(level, noise) for level in search.levels or LEVELS[process] for noise in range(search.noises)]
    with watch.open(recorder), torch.no_grad():
        for done, (level, number) in enumerate(looks, start=1):
            log_snr = torch.tensor([level], device=host.device)
            eps = gaussian(tuple(latents.shape), generator(search.seed, "look", level, number)).to(host.device)
            recorder.begin()
            host.denoiser(add_noise(process, latents, eps, log_snr), log_snr, conditioning)
            if progress is not None:
                progress(done, len(looks))
    return recorder
