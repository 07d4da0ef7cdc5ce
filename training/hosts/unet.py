"""Stable Diffusion 1.5, 2.x and SDXL: UNets over a discrete table of noise levels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clocks import DiscreteClock, discrete_schedule, linear_alphas, scaled_linear_alphas, zero_terminal_snr
from ..denoiser import SIZES, Conditioning
from .encoders import Autoencoder, PromptEncoder
from .host import Host
from .parts import Parts

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

BETA_SCHEDULES = {"scaled_linear": scaled_linear_alphas, "linear": linear_alphas}
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class UNetDenoiser:
    """Conditioning: ``context`` (b, n, d); for SDXL also ``pooled`` (b, d) and maybe ``sizes`` (b, 6)."""

    process = "vp"

    def __init__(
        self,
        family: str,  # "sdxl" or "sd15"
        unet: "UNet2DConditionModel",
        clock: DiscreteClock,
        prediction: str,
        pixels_per_latent: int = 8,
    ) -> None:
        self.family, self.module, self.clock, self.prediction = family, unet, clock, prediction
        self.log_snr_range = clock.log_snr_range
        self.pixels_per_latent = pixels_per_latent

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction (b, 4, h, w) in float32."""
        dtype = next(self.module.parameters()).dtype
        prediction = self.module(
            x_t.to(dtype),
            self.clock.time_of(log_snr),
            conditioning["context"].to(dtype),
            added_cond_kwargs=self._added(x_t, conditioning) if self.family == "sdxl" else None,
            return_dict=False,
        )[0]
        return prediction.float()

    def _added(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        time_ids = conditioning.get(SIZES)
        if time_ids is None:
            height, width = (side * self.pixels_per_latent for side in x_t.shape[-2:])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), -1)
        return {"text_embeds": conditioning["pooled"].to(next(self.module.parameters()).dtype), "time_ids": time_ids}


def discrete_clock(scheduler: dict[str, Any]) -> DiscreteClock:
    """The table that a diffusers scheduler's configuration describes. ValueError where it describes none."""
    schedule = scheduler.get("beta_schedule")
    if schedule not in BETA_SCHEDULES or scheduler.get("trained_betas") is not None:
        raise ValueError(
            f"{scheduler.get('_class_name', 'this scheduler')} has beta_schedule {schedule!r}, and a table of noise "
            f"levels can be made of {' or '.join(BETA_SCHEDULES)} only; models of the EDM kind are not supported"
        )
    alphas = BETA_SCHEDULES[schedule](
        scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02), scheduler.get("num_train_timesteps", 1000)
    )
    return DiscreteClock(zero_terminal_snr(alphas) if scheduler.get("rescale_betas_zero_snr") else alphas)


def prediction_of(scheduler: dict[str, Any]) -> str:
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"the scheduler has prediction_type {kind!r}, expected one of {', '.join(PREDICTION_TYPES)}")
    return PREDICTION_TYPES[kind]


def scheduler_of(parts: Parts) -> dict[str, Any]:
    """The scheduler's configuration, corrected by the marks that single files of v-prediction models carry."""
    scheduler, keys = parts.config("scheduler"), parts.keys()
    if "v_pred" in keys:
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        scheduler["rescale_betas_zero_snr"] = True
    return scheduler


def open_unet(parts: Parts) -> Host:
    """A Stable Diffusion 1.5, 2.x or XL on disk."""
    scheduler, autoencoder = scheduler_of(parts), Autoencoder(parts)
    clock, prediction = discrete_clock(scheduler), prediction_of(scheduler)
    unet = parts.load_denoiser("unet")
    parts.require_channels(unet.config.in_channels, autoencoder.channels)
    text = PromptEncoder(parts, unet, ENCODE[parts.family], tokens)
    return Host(
        name=parts.name,
        denoiser=UNetDenoiser(parts.family, unet, clock, prediction, autoencoder.pixels_per_latent),
        encode_images=autoencoder.encode,
        decode_latents=autoencoder.decode,
        open_decoder=autoencoder.open,
        encode_prompts=text.encode_prompts,
        token_ids=text.token_ids,
        open_text_encoders=text.open,
        pixels_per_latent=autoencoder.pixels_per_latent,
        # A UNet has no tokens. Counted like a transformer's, so that one resolution rule holds for all.
        pixels_per_token=2 * autoencoder.pixels_per_latent,
        resolution=unet.config.sample_size * autoencoder.pixels_per_latent,
        device=parts.device,
        training_conditioning={},
        sampling_conditioning={},
        latent_channels=autoencoder.channels,
        unet_layers=layers if isinstance(layers := unet.config.layers_per_block, int) else layers[0],
        schedule=lambda steps, tokens: discrete_schedule(clock, steps),
        guidance_scale={"sdxl": 5.0, "sd15": 7.5}[parts.family],
        told_sizes=parts.family == "sdxl",
    )


def encode_sd15(pipeline: Any, prompts: list[str], device: str) -> Conditioning:
    context, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
    return {"context": context}


def encode_sdxl(pipeline: Any, prompts: list[str], device: str) -> Conditioning:
    context, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def tokens(pipeline: Any) -> dict[str, int]:
    """SDXL's second CLIP has the same tokens as its first."""
    return {"tokenizer": pipeline.tokenizer.model_max_length}


ENCODE = {"sd15": encode_sd15, "sdxl": encode_sdxl}
