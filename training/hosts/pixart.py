"""PixArt-alpha and PixArt-Sigma: diffusion transformers over DDPM's linear table, conditioned on a masked T5.

The table reaches log_snr -10.1, where alpha is 0.006 and x0 = (x_t - sigma * eps) / alpha multiplies an error of
eps by 157: predictions leave here in float32.
"""

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clocks import DiscreteClock, discrete_schedule
from ..denoiser import SIZES, Conditioning
from .encoders import Autoencoder, PromptEncoder
from .host import Host
from .parts import DENOISER_PREFIX, Parts, reading
from .unet import discrete_clock, prediction_of

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel


# PixArt's own names -> the diffusers modules whose rows they stack, in this order
OUTER = {
    "x_embedder.proj": ("pos_embed.proj",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer": ("",),  # its scale_shift_table
}
BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "": ("",),  # its scale_shift_table
}
NOT_WEIGHTS = ("pos_embed", "y_embedder.y_embedding")  # computed, and T5's states of the empty prompt


class PixArtDenoiser:
    """Conditioning: ``context`` (b, n, d), its ``mask`` (b, n), 1 = a word, 0 = padding, and maybe ``sizes`` (b, 6)."""

    family = "pixart"
    process = "vp"

    def __init__(
        self,
        transformer: "PixArtTransformer2DModel",
        clock: DiscreteClock,
        prediction: str = "eps",
        pixels_per_latent: int = 8,
    ) -> None:
        self.module, self.clock, self.prediction = transformer, clock, prediction
        self.log_snr_range = clock.log_snr_range
        self.pixels_per_latent = pixels_per_latent

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction (b, 4, h, w) in float32, without the variance that the model also learned."""
        dtype = next(self.module.parameters()).dtype
        prediction = self.module(
            x_t.to(dtype),
            encoder_hidden_states=conditioning["context"].to(dtype),
            encoder_attention_mask=conditioning["mask"],
            timestep=self.clock.time_of(log_snr),
            added_cond_kwargs=self._size(x_t, conditioning.get(SIZES)),
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]].float()

    def _size(self, x_t: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor | None]:
        """What PixArt-alpha at 1024 pixels is told of the picture: the original's height and width in pixels, and the
        ratio of what was kept.
        """
        if not self.module.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        if sizes is None:
            height, width = (side * self.pixels_per_latent for side in x_t.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), -1)
        sizes = sizes.float()
        return {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:]}


def pixart_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in PixArt's own names in those of diffusers. ValueError for a key that is not PixArt's."""
    plain = {key.removeprefix(DENOISER_PREFIX): value for key, value in state.items()}
    diffusers: dict[str, Tensor] = {}
    for key in plain.keys() - set(NOT_WEIGHTS):
        block = re.match(r"blocks\.(\d+)\.", key)
        module, _, kind = key[block.end() if block else 0 :].rpartition(".")
        names = (BLOCK if block else OUTER).get(module)
        if names is None:
            raise ValueError(f"{key} is not a key of PixArt")
        for name, part in zip(names, plain[key].chunk(len(names)), strict=True):
            path = [f"transformer_blocks.{block[1]}" if block else "", name, kind]
            diffusers[".".join(filter(None, path))] = part
    return diffusers


def load_transformer(parts: Parts) -> "PixArtTransformer2DModel":
    """diffusers opens its own folders only; single files come in PixArt's own names."""
    if parts.checkpoint is None:
        return parts.load("transformer", parts.dtype)
    from accelerate import init_empty_weights
    from diffusers import PixArtTransformer2DModel

    with reading(f"the transformer of {parts.name}"):
        with init_empty_weights():
            transformer = PixArtTransformer2DModel.from_config(parts.config("transformer"))
        state = pixart_to_diffusers(parts.state("transformer"))
        transformer.load_state_dict({key: state[key].to(parts.dtype, copy=True) for key in state}, assign=True)
    return transformer.requires_grad_(False).eval()


def open_pixart(parts: Parts) -> Host:
    """A PixArt on disk."""
    scheduler, autoencoder = parts.config("scheduler"), Autoencoder(parts)
    clock, prediction = discrete_clock(scheduler), prediction_of(scheduler)
    transformer = parts.placed(load_transformer(parts))
    parts.require_channels(transformer.config.in_channels, autoencoder.channels)
    text = PromptEncoder(parts, transformer, encode, tokens)
    return Host(
        name=parts.name,
        denoiser=PixArtDenoiser(transformer, clock, prediction, autoencoder.pixels_per_latent),
        encode_images=autoencoder.encode,
        decode_latents=autoencoder.decode,
        open_decoder=autoencoder.open,
        encode_prompts=text.encode_prompts,
        token_ids=text.token_ids,
        pixels_per_latent=autoencoder.pixels_per_latent,
        pixels_per_token=transformer.config.patch_size * autoencoder.pixels_per_latent,
        resolution=transformer.config.sample_size * autoencoder.pixels_per_latent,
        device=parts.device,
        training_conditioning={},
        sampling_conditioning={},
        latent_channels=autoencoder.channels,
        schedule=lambda steps, tokens: discrete_schedule(clock, steps),
        guidance_scale=4.5,
        told_sizes=transformer.use_additional_conditions,
    )


def encode(pipeline: Any, prompts: list[str], device: str) -> Conditioning:
    """Padded to what each of the two was trained on: 120 tokens for alpha, 300 for Sigma (the pipelines' defaults)."""
    context, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
    return {"context": context, "mask": mask}


def tokens(pipeline: Any) -> dict[str, int]:
    return {"tokenizer": inspect.signature(pipeline.encode_prompt).parameters["max_sequence_length"].default}
