"""The embedded model as a host: a FLUX like any other, with encoders of its own."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..denoiser import Conditioning
from ..embedded.autoencoder import LATENT_CHANNELS, load_autoencoder
from ..embedded.features import features_of
from ..embedded.grammar import grammar
from ..embedded.oracle import load_oracle
from ..embedded.renderer import SIZE
from ..embedded.text import TextEncoder, encode_prompts
from ..embedded.transformer import load_transformer
from ..embedded.vocabulary import tokenize
from ..embedded.weights import Weights
from ..noise import PUBLISHED_TOKENS
from .flux import FluxDenoiser
from .host import Host
from .parts import Placing, reading


def load_embedded(
    weights: Weights | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    place: Placing | None = None,
) -> Host:
    """The embedded model; ``weights`` None = the shipped ones. ValueError where a file is missing or unreadable."""
    weights = weights or Weights()
    _require(weights.transformer, weights.autoencoder, weights.text_encoder)
    with reading(f"the weights in {weights.folder}"):
        transformer = load_transformer(weights.transformer, dtype)
        transformer = transformer.to(device) if place is None else place(transformer)
        autoencoder = load_autoencoder(weights.autoencoder).to(device)
        text_encoder = load_text_encoder(weights).to(device)

    @torch.no_grad()
    def encode_images(images: Tensor) -> Tensor:
        return autoencoder.encode(2 * images.to(device).float() - 1).latents

    def decode(latents: Tensor) -> Tensor:
        return (autoencoder.decode(latents.to(device).float()).sample / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(prompts: list[str]) -> Conditioning:
        context, pooled = encode_prompts(text_encoder, prompts)
        return {"context": context, "pooled": pooled}

    return Host(
        name="embedded",
        denoiser=FluxDenoiser(transformer),
        encode_images=encode_images,
        decode_latents=torch.no_grad()(decode),
        encode_prompts=encode,
        token_ids=lambda prompt: [tokenize(prompt).indices],
        pixels_per_latent=8,
        pixels_per_token=16,
        resolution=SIZE,
        device=device,
        training_conditioning={},
        sampling_conditioning={},
        latent_channels=LATENT_CHANNELS,
        reference_tokens=PUBLISHED_TOKENS,
        guidance_scale=3.0,
        prompts=grammar(),
        open_decoder=lambda: decode,
        open_features=lambda: features_of(load_oracle(weights.oracle).to(device)),
    )


def _require(*paths: Path) -> None:
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"the embedded model is not complete: {path} is missing. `stylewright embedded build` makes it"
            )


def load_text_encoder(weights: Weights) -> TextEncoder:
    """The text encoder in float32, frozen."""
    encoder = TextEncoder()
    encoder.load_state_dict({key: value.float() for key, value in load_file(weights.text_encoder).items()})
    return encoder.requires_grad_(False).eval()
