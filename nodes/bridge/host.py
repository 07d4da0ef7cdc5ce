"""MODEL, CLIP and VAE as one host of the training core."""

from collections.abc import Mapping
from functools import partial

import comfy.model_patcher
import comfy.samplers
import comfy.sd
import torch
from torch import Tensor

from ...training.data.cache import settle
from ...training.hosts.host import Host
from .denoiser import ComfyDenoiser
from .encodings import Encodings
from .families import (
    is_film,
    is_guidance_distilled,
    is_told_sizes,
    latent_format,
    latents_per_token,
    model_name,
    reference_tokens,
    refuse_untrainable,
    unet_layers,
)
from .noise_levels import noise_levels
from .prompts import GUIDANCE, PromptTable

# What trainers of FLUX.1-dev and its kin use: the distilled guidance neither pushes nor pulls. Pictures are drawn at
# ComfyUI's own default of the family, 3.5 for FLUX and 6 for HunyuanVideo, which holds where none is stated.
TRAINING_GUIDANCE = 1.0


def comfy_host(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP | None,  # None = all captions are among ``answers``
    vae: comfy.sd.VAE | None,  # None = all pictures are latents already
    *,
    resolution: int,
    answers: Mapping[str, dict] | None = None,  # what captions stand for that a user has encoded
    encodings: Encodings | None = None,  # where answers of the encoders are kept; None = nowhere
) -> Host:
    """The host of three sockets. Encoding and decoding work at any time, the denoiser inside a training session.

    Raises ValueError for a model that does not draw pictures from words, and a VAE that does not fit the model.
    """
    refuse_untrainable(model)
    if vae is not None:
        _refuse_foreign_vae(model, vae)
    encodings = encodings or Encodings()
    prompts = PromptTable(clip, answers or {}, encodings)
    pixels = pixels_per_latent(model) if vae is None else vae.spacial_compression_encode()
    distilled = is_guidance_distilled(model)
    form, levels, film = latent_format(model), noise_levels(model), is_film(model)
    denoiser = ComfyDenoiser(model, prompts)

    def encode_images(images: Tensor) -> Tensor:
        return encodings.recall("latent", images, partial(_encode_images, images))

    def _encode_images(images: Tensor) -> Tensor:
        with torch.inference_mode():
            # One by one: a video VAE takes a batch for the frames of one film.
            encoder = _required(vae)
            latents = [encoder.encode(image[None].movedim(1, -1)) for image in images]
        return settle(torch.cat([into_model(latent, model) for latent in latents]))

    def decode_latents(latents: Tensor) -> Tensor:
        with torch.inference_mode():
            latents = (latents[:, :, None] if film else latents).float() * levels.data_scale
            pictures = _required(vae).decode(form.process_out(latents.clone()))  # some write in place
            pictures = pictures.flatten(0, -4).movedim(-1, 1).float().clamp(0, 1)
        return settle(pictures)

    def schedule(steps: int, tokens: int) -> Tensor:
        sampling = model.get_model_object("model_sampling")
        return levels.log_snr(comfy.samplers.calculate_sigmas(sampling, "simple", steps))

    return Host(
        name=model_name(model),
        denoiser=denoiser,
        encode_images=encode_images,
        decode_latents=decode_latents,
        encode_prompts=prompts.encode,
        pixels_per_latent=pixels,
        pixels_per_token=pixels * latents_per_token(model),
        resolution=resolution,
        device=str(model.load_device),
        training_conditioning={GUIDANCE: torch.tensor([TRAINING_GUIDANCE])} if distilled else {},
        sampling_conditioning={},
        latent_channels=form.latent_channels,
        reference_tokens=reference_tokens(model),
        unet_layers=unet_layers(model),
        schedule=schedule,
        told_sizes=is_told_sizes(model),
    )


def _required(vae: comfy.sd.VAE | None) -> comfy.sd.VAE:
    if vae is None:
        raise ValueError("there is no VAE: link the one that belongs to the model")
    return vae


def pixels_per_latent(model: comfy.model_patcher.ModelPatcher) -> int:
    """Side in pixels of a position of the latents that a model works on."""
    return latent_format(model).spacial_downscale_ratio


def into_model(latents: Tensor, model: comfy.model_patcher.ModelPatcher) -> Tensor:
    """Latents (b, c, h, w) or of one frame (b, c, 1, h, w) as LATENT sockets have them, in the model's space."""
    with torch.inference_mode():
        latents = latents[:, :, None] if is_film(model) and latents.ndim == 4 else latents
        inside = latent_format(model).process_in(latents.clone()).float() / noise_levels(model).data_scale
    return settle(inside[:, :, 0] if inside.ndim == 5 else inside)


def _refuse_foreign_vae(model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE) -> None:
    expected = latent_format(model).latent_channels
    if vae.latent_channels != expected:
        raise ValueError(
            f"the VAE makes latents of {vae.latent_channels} channels, but {model_name(model)} works on {expected}: "
            "connect the VAE that belongs to the model"
        )
