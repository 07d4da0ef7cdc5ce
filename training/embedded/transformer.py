"""The embedded transformer: FLUX.1's architecture, a few million parameters.

Its file has the key names of black-forest-labs/flux, which ComfyUI opens as FLUX. There is no ``guidance_in``,
so that ComfyUI takes it for the schnell variant: flow, time in [0, 1], shift 1.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from ..formats.keys_flux import flux_to_original
from ..formats.state import write_atomically
from ..hosts.flux import transformer_of
from .autoencoder import LATENT_CHANNELS
from .text import WIDTH

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


def new_transformer() -> "FluxTransformer2DModel":
    """An untrained transformer. A token is 2x2 latent pixels, so a 128x128 picture has 64 of them."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=128,  # FLUX's own, which its rotary axes (16 + 56 + 56) have to fill
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )


def save_transformer(path: Path, transformer: "FluxTransformer2DModel", dtype: torch.dtype = torch.bfloat16) -> None:
    state = flux_to_original(transformer.state_dict())
    state = {key: value.to(dtype).contiguous() for key, value in state.items()}
    write_atomically(path, lambda temporary: save_file(state, temporary))


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> "FluxTransformer2DModel":
    """The transformer of a file with original FLUX keys, of any size, frozen and in evaluation mode."""
    return transformer_of(load_file(path), dtype)
