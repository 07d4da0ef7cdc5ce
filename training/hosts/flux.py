"""FLUX.1: a rectified flow on 2x2 packed latents, conditioned on T5 states, a pooled CLIP vector and guidance."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ..clocks import FlowClock, flow_schedule, flux_shift_mu
from ..denoiser import Conditioning
from ..formats.keys_flux import flux_config, flux_to_diffusers
from .encoders import Autoencoder, PromptEncoder
from .host import Host
from .parts import Parts, reading

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

CLOCK = FlowClock()  # diffusers multiplies by 1000 inside
TRAINING_GUIDANCE, SAMPLING_GUIDANCE = 1.0, 3.5  # arXiv 2411.14793 trains with 1.0 and samples with 7.0


class FluxDenoiser:
    """FLUX.1-dev, FLUX.1-schnell and everything shaped like them.

    Conditioning: ``context`` (b, n, d), ``pooled`` (b, d) and, for a guidance-distilled model, ``guidance`` (b,).
    """

    family = "flux"
    process = "flow"
    prediction = "flow"
    clock = CLOCK
    log_snr_range = CLOCK.log_snr_range

    def __init__(self, transformer: "FluxTransformer2DModel") -> None:
        self.module = transformer

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicted flow (b, 16, h, w) in float32; h and w are even."""
        dtype, device = next(self.module.parameters()).dtype, x_t.device
        height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        context, time = conditioning["context"].to(dtype), CLOCK.time_of(log_snr)
        with exact_time(self.module, 1000 * time):
            packed = self.module(
                hidden_states=pack(x_t).to(dtype),
                encoder_hidden_states=context,
                pooled_projections=conditioning["pooled"].to(dtype),
                timestep=time,
                guidance=self._guidance(conditioning, len(x_t)),
                img_ids=image_ids(height, width, device),
                txt_ids=torch.zeros(context.shape[1], 3, device=device),
                return_dict=False,
            )[0]
        return unpack(packed, height).float()

    def _guidance(self, conditioning: Conditioning, rows: int) -> Tensor | None:
        if not self.module.config.guidance_embeds:
            return None
        if "guidance" not in conditioning:
            raise ValueError('this FLUX is guidance-distilled: its conditioning needs "guidance" (b,), 1.0 in training')
        return conditioning["guidance"].float().expand(rows)


def pack(latents: Tensor) -> Tensor:
    """Latents (b, c, 2h, 2w) as tokens (b, h*w, 4c), channel-major."""
    if latents.shape[-2] % 2 or latents.shape[-1] % 2:
        raise ValueError(f"FLUX takes latents with even sides, got {tuple(latents.shape)}: use multiples of 16 pixels")
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, height: int) -> Tensor:
    """The inverse of :func:`pack`; ``height`` is in tokens."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height, ph=2, pw=2)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Positions (h*w, 3) of the image tokens: 0, row, column. Text tokens are all at the origin."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float().to(device)


@contextmanager
def exact_time(transformer: "FluxTransformer2DModel", timestep: Tensor) -> Iterator[None]:
    """Embeds this timestep (b,), in [0, 1000], in float32.

    diffusers rounds it to the activations' type; bfloat16 has steps of 4 near 1000, where styles are learned.
    """
    hook = transformer.time_text_embed.register_forward_pre_hook(lambda _, inputs: (timestep, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def transformer_of(state: Mapping[str, Tensor], dtype: torch.dtype) -> "FluxTransformer2DModel":
    """The transformer of a checkpoint in original names, of any size: diffusers' own reader knows one size only."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**flux_config(state))
    # Copies: what was one fused layer in the file would otherwise share its memory.
    diffusers = {key: value.to(dtype, copy=True) for key, value in flux_to_diffusers(state).items()}
    transformer.load_state_dict(diffusers, assign=True)
    return transformer.requires_grad_(False).eval()


def open_flux(parts: Parts) -> Host:
    """A FLUX.1 on disk."""
    if parts.checkpoint is None:
        transformer = parts.load("transformer", parts.dtype)
    else:
        with reading(f"the transformer of {parts.name}"):
            transformer = transformer_of(parts.state("transformer"), parts.dtype)
    autoencoder, distilled = Autoencoder(parts), transformer.config.guidance_embeds
    parts.require_channels(transformer.config.in_channels, 4 * autoencoder.channels)
    shifted = bool(parts.config("scheduler").get("use_dynamic_shifting"))
    denoiser = FluxDenoiser(parts.placed(transformer))
    text = PromptEncoder(parts, transformer, encode, tokens)
    return Host(
        name=parts.name,
        denoiser=denoiser,
        encode_images=autoencoder.encode,
        decode_latents=autoencoder.decode,
        open_decoder=autoencoder.open,
        encode_prompts=text.encode_prompts,
        token_ids=text.token_ids,
        open_text_encoders=text.open,
        pixels_per_latent=autoencoder.pixels_per_latent,
        pixels_per_token=2 * autoencoder.pixels_per_latent,
        resolution=1024,
        device=parts.device,
        training_conditioning=guidance(TRAINING_GUIDANCE, parts.device) if distilled else {},
        sampling_conditioning=guidance(SAMPLING_GUIDANCE, parts.device) if distilled else {},
        latent_channels=autoencoder.channels,
        schedule=shifted_schedule if shifted else even_schedule,
    )


def encode(pipeline: Any, prompts: list[str], device: str) -> Conditioning:
    length = tokens(pipeline)["tokenizer_2"]
    context, pooled, _ = pipeline.encode_prompt(prompts, None, device=device, max_sequence_length=length)
    return {"context": context, "pooled": pooled}


def tokens(pipeline: Any) -> dict[str, int]:
    """FLUX.1-schnell, which is not guidance-distilled, was trained on 256 tokens."""
    return {"tokenizer_2": 512 if pipeline.transformer.config.guidance_embeds else 256}


def guidance(scale: float, device: str) -> Conditioning:
    return {"guidance": torch.tensor([scale], device=device)}


def shifted_schedule(steps: int, tokens: int) -> Tensor:
    """FLUX.1-dev's: the more tokens, the more steps at high noise."""
    return flow_schedule(steps, math.exp(flux_shift_mu(tokens)))


def even_schedule(steps: int, tokens: int) -> Tensor:
    """FLUX.1-schnell's: evenly spaced times."""
    return flow_schedule(steps)
