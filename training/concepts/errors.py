"""Where a phrase helps a frozen model to draw: where it errs more on a picture when the prompt lacks the phrase.

Of any model, without a look inside. That a model which knows what is there errs less is how diffusion models classify
(Li et al. 2023, arXiv 2303.16203); to take the difference at each place, and to leave phrases out of the prompt, is
our choice.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hosts.generate import with_extras
from ..hosts.host import Host
from ..noise import add_noise, gaussian
from ..predictions import target
from ..randomness import generator
from .locate import LEVELS, Search
from .maps import contrasted
from .phrases import place_in

# One level noisier than where attention is looked at: what is asked for matters most where little is seen.
ERROR_LEVELS = {process: (*levels, 2 * levels[-1] - levels[-2]) for process, levels in LEVELS.items()}


@torch.no_grad()
def error_maps(
    host: Host,
    picture: Tensor,  # (3, h, w) in [0, 1]; h and w are multiples of the host's pixels_per_token
    prompt: str,
    phrases: Sequence[str],
    search: Search,
    progress: Callable[[int, int], None] | None = None,  # noises done, and in all
) -> Tensor:
    """Maps (phrases, h', w') of latent pixels, in [0, 1]: each less the mean of the others, so that they compete, and
    then the root, which is an error in the prediction's own unit.

    Of content phrases alone: a style is everywhere. ValueError for a phrase that is no part of the prompt.
    """
    texts = [prompt, *(without(prompt, phrase) for phrase in phrases)]
    conditionings = [with_extras(host.encode_prompts([text]), host.training_conditioning) for text in texts]
    latents = host.encode_images(picture[None].to(host.device)).to(host.device)
    process, sums = host.denoiser.process, torch.zeros(len(texts), *latents.shape[-2:])
    looks = [(level, noise) for level in search.levels or ERROR_LEVELS[process] for noise in range(search.noises)]
    for done, (level, number) in enumerate(looks, start=1):
        log_snr = torch.tensor([level], device=host.device)
        eps = gaussian(tuple(latents.shape), generator(search.seed, "look", level, number)).to(host.device)
        x_t = add_noise(process, latents, eps, log_snr)
        wanted = target(host.denoiser.prediction, process, latents, eps, log_snr)
        for row, conditioning in enumerate(conditionings):
            placed = {name: value.to(host.device) for name, value in conditioning.items()}
            sums[row] += (host.denoiser(x_t, log_snr, placed).float() - wanted).square().mean(1)[0].cpu()
        if progress is not None:
            progress(done, len(looks))
    return contrasted(smooth(sums[1:] - sums[:1], host.pixels_per_token // host.pixels_per_latent)).sqrt()


def without(prompt: str, phrase: str) -> str:
    """A prompt less one of its phrases. ValueError where it is no part of it."""
    place = place_in(prompt, phrase)
    if place is None:
        raise ValueError(f"the phrase {phrase!r} is no part of the prompt {prompt!r}")
    return " ".join((prompt[: place[0]] + prompt[place[1] :]).split())


def smooth(maps: Tensor, token: int) -> Tensor:
    """Maps (phrases, h, w) as means over the places around each, a token and half of its neighbours; what is below
    zero, where the phrase does not help, is zero."""
    around = token // 2 * 2 + 1
    padded = F.pad(maps[None], [around // 2] * 4, mode="replicate")
    return F.avg_pool2d(padded, around, 1)[0].clamp(min=0)
