"""MODEL, CLIP and VAE as one host of the training core."""

import comfy.model_patcher
import comfy.samplers
import comfy.sd
import torch
from torch import Tensor

from ...training.data.cache import settle
from ...training.hosts.host import Host
from ...training.noise import log_snr_of_time
from .denoiser import ComfyDenoiser
from .families import is_guidance_distilled, latents_per_token, model_name, reference_tokens, unet_layers
from .prompts import GUIDANCE, PromptTable

TRAINING_GUIDANCE = 1.0  # what trainers of FLUX.1-dev use: the distilled guidance neither pushes nor pulls
SAMPLING_GUIDANCE = 3.5  # ComfyUI's own default


def comfy_host(
    model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE, *, resolution: int
) -> Host:
    """The host of three sockets. Encoding and decoding work at any time, the denoiser inside a training session.

    Raises ValueError for a VAE that does not fit the model.
    """
    _refuse_foreign_vae(model, vae)
    prompts = PromptTable(clip)
    pixels = vae.spacial_compression_encode()
    distilled = is_guidance_distilled(model)
    film = model.model.latent_format.latent_dimensions == 3  # a picture is a film of one frame
    denoiser = ComfyDenoiser(model, prompts)

    def encode_images(images: Tensor) -> Tensor:
        with torch.inference_mode():
            # One by one: a video VAE takes a batch for the frames of one film.
            latents = [vae.encode(image[None].movedim(1, -1)) for image in images]
            latents = torch.cat([model.model.process_latent_in(latent).float() for latent in latents])
        return settle(latents[:, :, 0] if latents.ndim == 5 else latents)

    def decode_latents(latents: Tensor) -> Tensor:
        with torch.inference_mode():
            latents = latents[:, :, None] if film else latents
            pictures = vae.decode(model.model.process_latent_out(latents.float().clone()))  # some write in place
            pictures = pictures.flatten(0, -4).movedim(-1, 1).float().clamp(0, 1)
        return settle(pictures)

    def schedule(steps: int, tokens: int) -> Tensor:
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps).double()
        return (log_snr_of_time(sigmas) if denoiser.process == "flow" else -2 * sigmas.log()).float()

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
        sampling_conditioning={GUIDANCE: torch.tensor([SAMPLING_GUIDANCE])} if distilled else {},
        latent_channels=model.model.latent_format.latent_channels,
        reference_tokens=reference_tokens(model),
        unet_layers=unet_layers(model),
        schedule=schedule,
    )


def _refuse_foreign_vae(model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE) -> None:
    expected = model.model.latent_format.latent_channels
    if vae.latent_channels != expected:
        raise ValueError(
            f"the VAE makes latents of {vae.latent_channels} channels, but {model_name(model)} works on {expected}: "
            "connect the VAE that belongs to the model"
        )
