"""Models of random weights in diffusers' layout: small ones for the CPU, and some of the real size for a GPU."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALL_FLUX = {
    "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 128, "num_attention_heads": 3,
    "joint_attention_dim": 256, "pooled_projection_dim": 128,
}  # fmt: skip
FLUX_DEV = {
    "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
SMALL_SD3 = {
    "num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 6, "joint_attention_dim": 256,
    "caption_projection_dim": 384, "pooled_projection_dim": 128, "pos_embed_max_size": 96, "out_channels": 16,
}  # fmt: skip
SMALL_SDXL = {
    "block_out_channels": (64, 128), "layers_per_block": 2, "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2), "cross_attention_dim": 256, "projection_class_embeddings_input_dim": 128 + 6 * 256,
    "addition_time_embed_dim": 256,
}  # fmt: skip
SDXL = {
    "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816, "addition_time_embed_dim": 256,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model to build, and what it is conditioned on."""

    family: str
    options: dict[str, Any]
    channels: int
    context: tuple[int, int]  # tokens, width
    pooled: int


KINDS = {
    "flux": Kind("flux", SMALL_FLUX, 16, (64, 256), 128),
    "sd3": Kind("sd3", SMALL_SD3, 16, (64, 256), 128),
    "sdxl": Kind("sdxl", SMALL_SDXL, 4, (77, 256), 128),
    "flux-dev": Kind("flux", FLUX_DEV, 16, (512, 4096), 768),
    "sdxl-base": Kind("sdxl", SDXL, 4, (77, 2048), 1280),
}


def denoiser_of(kind: Kind, device: str, dtype: torch.dtype) -> Any:
    """Our denoiser over a frozen model of random weights. To be called after ``load_package``."""
    from stylewright.training.hosts.flux import FluxDenoiser
    from stylewright.training.hosts.sd3 import SD3Denoiser

    model = model_of(kind, device, dtype)
    if kind.family == "flux":
        return FluxDenoiser(model)
    return SD3Denoiser(model) if kind.family == "sd3" else _unet_denoiser(model)


def model_of(kind: Kind, device: str, dtype: torch.dtype) -> Any:
    """A frozen model of diffusers', with the same random weights in every process."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return _model(kind).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)


def _model(kind: Kind) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    if kind.family == "flux":
        return FluxTransformer2DModel(in_channels=4 * kind.channels, **kind.options)
    if kind.family == "sd3":
        return SD3Transformer2DModel(in_channels=kind.channels, **kind.options)
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, addition_embed_type="text_time", use_linear_projection=True, **kind.options
    )


def _unet_denoiser(model: torch.nn.Module) -> Any:
    from stylewright.training.clocks import DiscreteClock, scaled_linear_alphas
    from stylewright.training.hosts.unet import UNetDenoiser

    return UNetDenoiser("sdxl", model, DiscreteClock(scaled_linear_alphas(0.00085, 0.012, 1000)), "eps")


def conditioning_of(kind: Kind) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    return {
        "context": torch.randn(1, *kind.context, generator=source),
        "pooled": torch.randn(1, kind.pooled, generator=source),
    }
