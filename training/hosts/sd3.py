"""Stable Diffusion 3 and 3.5: a rectified flow conditioned on two CLIPs and a T5."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..clocks import FlowClock, flow_schedule
from ..denoiser import Conditioning
from .encoders import Autoencoder, PromptEncoder
from .host import Host
from .parts import Parts

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

CLOCK = FlowClock(scale=1000.0)


class SD3Denoiser:
    """Conditioning: ``context`` (b, n, d) and ``pooled`` (b, d)."""

    family = "sd3"
    process = "flow"
    prediction = "flow"
    clock = CLOCK
    log_snr_range = CLOCK.log_snr_range

    def __init__(self, transformer: "SD3Transformer2DModel") -> None:
        self.module = transformer

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicted flow (b, 16, h, w) in float32; h and w are multiples of the patch size, 2."""
        dtype = next(self.module.parameters()).dtype
        prediction = self.module(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=conditioning["context"].to(dtype),
            pooled_projections=conditioning["pooled"].to(dtype),
            timestep=CLOCK.time_of(log_snr),
            return_dict=False,
        )[0]
        return prediction.float()


def open_sd3(parts: Parts) -> Host:
    """A Stable Diffusion 3 or 3.5 on disk."""
    transformer, autoencoder = parts.load_denoiser("transformer"), Autoencoder(parts)
    parts.require_channels(transformer.config.in_channels, autoencoder.channels)
    shift = parts.config("scheduler").get("shift", 1.0)
    text = PromptEncoder(parts, transformer, encode, tokens)
    return Host(
        name=parts.name,
        denoiser=SD3Denoiser(transformer),
        encode_images=autoencoder.encode,
        decode_latents=autoencoder.decode,
        open_decoder=autoencoder.open,
        encode_prompts=text.encode_prompts,
        token_ids=text.token_ids,
        open_text_encoders=text.open,
        pixels_per_latent=autoencoder.pixels_per_latent,
        pixels_per_token=transformer.config.patch_size * autoencoder.pixels_per_latent,
        resolution=transformer.config.sample_size * autoencoder.pixels_per_latent,
        device=parts.device,
        training_conditioning={},
        sampling_conditioning={},
        latent_channels=autoencoder.channels,
        schedule=lambda steps, tokens: flow_schedule(steps, shift),
        guidance_scale=4.5,
    )


def encode(pipeline: Any, prompts: list[str], device: str) -> Conditioning:
    context, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=device, do_classifier_free_guidance=False
    )
    return {"context": context, "pooled": pooled}


def tokens(pipeline: Any) -> dict[str, int]:
    """Of the CLIPs, which have the same, and of T5, in the place of which there are as many zeros as of a CLIP."""
    clip = pipeline.tokenizer_max_length
    return {"tokenizer": clip, "tokenizer_3": 256 if pipeline.text_encoder_3 is not None else clip}
