"""FLUX.1: a rectified flow on 2x2 packed latents, conditioned on T5 states, a pooled CLIP vector and guidance."""

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from ..denoiser import Conditioning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import FluxTransformer2DModel


class FluxDenoiser:
    """FLUX.1-dev, FLUX.1-schnell and everything shaped like them.

    Conditioning: ``context`` (b, n, d), ``pooled`` (b, d) and, for a guidance-distilled model, ``guidance`` (b,).
    """

    family = "flux"
    process = "flow"
    prediction = "flow"

    def __init__(self, transformer: "FluxTransformer2DModel") -> None:
        self.module = transformer
        self.log_snr_range = (-float("inf"), float("inf"))

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicted flow (b, 16, h, w) in float32; h and w are even."""
        dtype, device = next(self.module.parameters()).dtype, x_t.device
        height, width = x_t.shape[-2:]
        context = conditioning["context"].to(dtype)
        # A flow's time, 0 = data, 1 = noise. diffusers multiplies it by 1000.
        time = torch.sigmoid(-log_snr.float() / 2)
        with exact_time(self.module, 1000 * time):
            packed = self.module(
                hidden_states=pack(x_t).to(dtype),
                encoder_hidden_states=context,
                pooled_projections=conditioning["pooled"].to(dtype),
                timestep=time,
                guidance=self._guidance(conditioning),
                img_ids=image_ids(height // 2, width // 2, device),
                txt_ids=torch.zeros(context.shape[1], 3, device=device),
                return_dict=False,
            )[0]
        return unpack(packed, height // 2).float()

    def _guidance(self, conditioning: Conditioning) -> Tensor | None:
        if not self.module.config.guidance_embeds:
            return None
        if "guidance" not in conditioning:
            raise ValueError('this FLUX is guidance-distilled: its conditioning needs "guidance" (b,), 1.0 in training')
        return conditioning["guidance"].float()


def pack(latents: Tensor) -> Tensor:
    """Latents (b, c, 2h, 2w) as tokens (b, h*w, 4c), channel-major."""
    if latents.shape[-2] % 2 or latents.shape[-1] % 2:
        raise ValueError(f"FLUX needs latents with even sides, got {tuple(latents.shape)}: make pictures multiples of 16")
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, height: int) -> Tensor:
    """The inverse of :func:`pack`; ``height`` is in tokens."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height, ph=2, pw=2)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Positions (h*w, 3) of the image tokens: 0, row, column. Text tokens are all at the origin."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float().to(device)


@contextmanager
def exact_time(transformer: "FluxTransformer2DModel", timestep: Tensor) -> "Iterator[None]":
    """Embeds this timestep (b,), in [0, 1000], in float32.

    diffusers rounds it to the activations' type; bfloat16 has steps of 4 near 1000, where styles are learned.
    """
    hook = transformer.time_text_embed.register_forward_pre_hook(lambda _, inputs: (timestep, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
