"""Pictures from prompts, with any host."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..adapters.attach import Adapter
from ..attention_presets import preset
from ..denoiser import Conditioning, Denoiser
from ..guidance import Guidance
from ..noise import gaussian
from ..one_step import answer_of, first_input
from ..one_step import generate as draw
from ..randomness import generator
from ..sampling import sample
from .guided import GuidedDenoiser
from .host import Host
from .negative import NegativeDenoiser


@torch.no_grad()
def generate(
    host: Host,
    prompts: list[str],
    *,
    seed: int,
    first: int = 0,  # number of the first picture, where several calls draw one series
    steps: int = 20,
    guidance_scale: float | None = None,  # None = the host's own
    size: tuple[int, int] | None = None,  # height and width in pixels; None = the host's resolution, square
    negative: str = "",
    guidance: Guidance | None = None,  # a rule that takes the place of ``guidance_scale``; for the ``adapter`` …
    adapter: Adapter | None = None,  # … that is on the host's model
    one_step: Tensor | None = None,  # log_snr (1,) at which a student is called, once and without guidance
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """One picture a prompt, (b, 3, h, w) in [0, 1] on the CPU.

    Picture i depends on (seed, i) alone, not on how many are drawn with it. ValueError where there are no prompts, and
    for a size that the model cannot draw, or a rule
    without an adapter.
    """
    if not prompts:
        raise ValueError("there are no prompts: give at least one")
    height, width = size or (host.resolution, host.resolution)
    if height % host.pixels_per_token or width % host.pixels_per_token or min(height, width) < 1:
        raise ValueError(f"{host.name} draws sizes that are multiples of {host.pixels_per_token}, got {width}x{height}")
    shape = (1, host.latent_channels, height // host.pixels_per_latent, width // host.pixels_per_latent)
    noise = torch.cat([gaussian(shape, generator(seed, "picture", first + i)) for i in range(len(prompts))])
    scale = host.guidance_scale if guidance_scale is None else guidance_scale

    def conditioning(texts: list[str]) -> Conditioning:
        return with_extras(host.encode_prompts(texts), host.sampling_conditioning)

    if one_step is not None:
        noise, process = noise.to(host.device), host.denoiser.process
        denoiser = host.denoiser
        if negative:  # inside attention: a student is not guided from outside
            away = conditioning([negative] * len(prompts))
            denoiser = NegativeDenoiser(denoiser, preset(denoiser.family).guidance, away)
        answer, fed = answer_of(denoiser, conditioning(prompts)), first_input(process, noise, one_step)
        drawn = draw(answer, fed, noise, process=process, log_snrs=one_step.to(host.device))
        return host.decode_latents(drawn).cpu()
    denoiser: Denoiser = host.denoiser
    asked, null = conditioning(prompts), None
    if guidance is not None:
        if adapter is None:
            raise ValueError("a rule that tells a model with an adapter from one without needs an adapter: give one")
        denoiser, scale = GuidedDenoiser(denoiser, adapter, guidance, conditioning([negative] * len(prompts))), 1.0
    elif scale != 1.0:
        null = conditioning([negative] * len(prompts))
    latents = sample(
        denoiser,
        noise.to(host.device),
        asked,
        log_snrs=host.schedule(steps, height * width // host.pixels_per_token**2),
        null_conditioning=null,
        guidance_scale=scale,
        callback=callback,
    )
    return host.decode_latents(latents).cpu()


def with_extras(conditioning: Conditioning, extras: Conditioning) -> Conditioning:
    """The conditioning of a batch with a host's extra entries, (1, …) each, repeated for every row."""
    rows = len(next(iter(conditioning.values())))
    return {**conditioning, **{name: value.expand(rows, *value.shape[1:]) for name, value in extras.items()}}
