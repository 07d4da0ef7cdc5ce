"""How alike pictures and texts are, by models on disk: a CLIP, and a small decoder to see latents with."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .encoders import decoded
from .host import Features
from .parts import read_json, reading


def open_clip(folder: Path, device: str) -> Features:
    """A CLIP as transformers saves it, in float32. ValueError where the folder holds none; nothing is downloaded."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    _require(folder, "model_type", ("clip",), "a CLIP of transformers (config.json, model.safetensors, its tokenizer)")
    with reading(f"the CLIP in {folder}"):
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        file = folder / "preprocessor_config.json"
        looks = CLIPImageProcessor(**read_json(file)) if file.is_file() else CLIPImageProcessor()
    model = model.requires_grad_(False).eval().to(device)
    side, mean, std = model.config.vision_config.image_size, looks.image_mean, looks.image_std

    def pictures(images: Tensor) -> Tensor:
        pixels = normalised(images.to(device).float(), side, mean, std)
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def texts(prompts: list[str]) -> Tensor:
        told = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").to(device)
        return model.text_projection(model.text_model(**told).pooler_output)

    return Features(f"{folder.name}, {model.config.projection_dim} features", pictures, texts)


def normalised(images: Tensor, side: int, mean: list[float], std: list[float]) -> Tensor:
    """Pictures (b, 3, h, w) in [0, 1] as CLIP is shown them: the middle square at ``side`` pixels."""
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = [round(height * scale), round(width * scale)]
    images = F.interpolate(images, size, mode="bicubic", antialias=True)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    images = images[..., top : top + side, left : left + side]
    places = (torch.tensor(values, device=images.device).reshape(3, 1, 1) for values in (mean, std))
    center, spread = places
    return (images - center) / spread


def open_tiny_decoder(folder: Path, channels: int, device: str) -> Callable[[Tensor], Tensor]:
    """A diffusers AutoencoderTiny (TAESD and its kin) for latents of so many channels, with gradients.

    ValueError for another autoencoder, or one of other latents.
    """
    from diffusers import AutoencoderTiny

    config = _require(folder, "_class_name", ("AutoencoderTiny",), "an AutoencoderTiny of diffusers, such as TAESD")
    if (found := config.get("latent_channels", 4)) != channels:
        raise ValueError(f"{folder} decodes latents of {found} channels, and the model has {channels}")
    with reading(f"the decoder in {folder}"):
        vae: Any = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    vae = vae.requires_grad_(False).eval().to(device)
    return partial(decoded, vae, scale=vae.config.scaling_factor, shift=vae.config.shift_factor)


def _require(folder: Path, key: str, kinds: tuple[str, ...], expected: str) -> dict[str, Any]:
    """The configuration in a folder. ValueError where it is of something else."""
    config = read_json(folder / "config.json")
    if config.get(key) not in kinds:
        raise ValueError(f"{folder} holds {config.get(key) or 'something else'}: expected {expected}")
    return config
