"""The embedded autoencoder: TAESD's layout with 16 latent channels, 8x smaller than the picture.

Madebyollin's TAESD, as diffusers' ``AutoencoderTiny`` implements it. Its encoder output *is* the latent that
the transformer works on. The file uses the key layout that ComfyUI's stock ``VAELoader`` recognises, with
``vae_scale`` and ``vae_shift`` chosen so that ComfyUI's FLUX latent format, model = (z - shift) * scale,
undoes what its TAESD wrapper does, z = encoder(x) / vae_scale + vae_shift.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from ..formats.state import write_atomically

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

LATENT_CHANNELS = 16
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # FLUX.1's latent format


def new_autoencoder() -> "AutoencoderTiny":
    """An untrained autoencoder. Pictures are (b, 3, h, w) in [-1, 1], latents (b, 16, h/8, w/8)."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(latent_channels=LATENT_CHANNELS)


def save_autoencoder(path: Path, autoencoder: "AutoencoderTiny", dtype: torch.dtype = torch.bfloat16) -> None:
    state = {_to_taesd(key): value.to(dtype).contiguous() for key, value in autoencoder.state_dict().items()}
    state |= {"vae_scale": torch.tensor(FLUX_SCALE), "vae_shift": torch.tensor(FLUX_SHIFT)}
    write_atomically(path, lambda temporary: save_file(state, temporary))


def load_autoencoder(path: Path) -> "AutoencoderTiny":
    """The autoencoder of a file with TAESD keys, in float32 and evaluation mode. ValueError for another file."""
    state = {_from_taesd(key): value.float() for key, value in load_file(path).items() if not key.startswith("vae_")}
    autoencoder = new_autoencoder()
    autoencoder.load_state_dict(state)
    return autoencoder.requires_grad_(False).eval()


def _to_taesd(key: str) -> str:
    part, _, index, rest = key.split(".", 3)  # encoder.layers.0.weight
    # TAESD's decoder counts its clamp as layer 0; diffusers applies it outside the list.
    return f"taesd_{part}.{int(index) + (part == 'decoder')}.{rest}"


def _from_taesd(key: str) -> str:
    found = re.fullmatch(r"taesd_(encoder|decoder)\.(\d+)\.(.+)", key)
    if not found:
        raise ValueError(f"{key} is no key of a TAESD file: expected the embedded model's autoencoder")
    part, index, rest = found.groups()
    return f"{part}.layers.{int(index) - (part == 'decoder')}.{rest}"
