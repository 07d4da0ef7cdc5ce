"""Stages 1 and 4: the autoencoder, on random crops of renders, and a refinement of its decoder alone."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ...randomness import generator
from ..autoencoder import load_autoencoder, new_autoencoder, save_autoencoder
from ..renderer import Scene, render
from .scenes import training_scenes
from .stage import flatten_kernels, optimisers, run, trapezoid, unflatten_kernels

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

logger = logging.getLogger(__name__)

STEPS = 1000
DECODER_STEPS = 500
BATCH = 8
CROP = 64  # pixels
LATENT_NOISE = 0.15  # largest deviation of the noise added before decoding: a smoother latent is easier to model
LR = 2e-3


def train_autoencoder(work: Path, out: Path, *, seed: int, steps: int = STEPS) -> None:
    """Trains and saves the autoencoder to ``out``; ``work`` holds the checkpoint."""
    torch.manual_seed(seed)  # the process is this command's own: layers draw their initial weights globally
    model = new_autoencoder().to(memory_format=torch.channels_last)
    flatten_kernels(model)

    def step(i: int) -> Tensor:
        draw = generator(seed, "autoencoder", i)
        pictures = _crops(training_scenes(BATCH, seed, "autoencoder", i, random_palette=0.5), draw)
        noise = LATENT_NOISE * torch.rand(BATCH, 1, 1, 1, generator=draw)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(pictures).float()
            decoded = model.decoder(latents + noise * torch.randn(latents.shape, generator=draw)).float()
        loss = reconstruction_loss(decoded, pictures) + 0.05 * moments(latents)
        loss.backward()
        return loss

    def evaluate(_: int) -> str:
        return f"PSNR {psnr(model, seed):.2f} dB"

    # No average of the weights here: the decay of the learning rate to zero does the same.
    matrices = optimisers(model.named_parameters(), lambda name: "original" in name, LR)
    checkpoint, schedule = work / "autoencoder.safetensors", trapezoid(steps, 50, 0.5)
    run(checkpoint, step, steps, matrices, schedule, {"model": model}, evaluate=evaluate)
    unflatten_kernels(model)
    save_autoencoder(out, model)
    logger.info("autoencoder: %s, PSNR %.2f dB on held-out pictures", out, psnr(load_autoencoder(out), seed))


def refine_decoder(work: Path, path: Path, *, seed: int, steps: int = DECODER_STEPS) -> None:
    """Trains the decoder of the autoencoder in ``path`` further and writes it back.

    The encoder, and with it the latent space, stays as it is: a transformer trained there remains right.
    """
    model = load_autoencoder(path).to(memory_format=torch.channels_last)
    flatten_kernels(model.decoder)
    model.decoder.requires_grad_(True)

    def step(i: int) -> Tensor:
        draw = generator(seed, "decoder", i)
        pictures = _crops(training_scenes(BATCH, seed, "decoder", i, random_palette=0.5), draw)
        noise = LATENT_NOISE * torch.rand(BATCH, 1, 1, 1, generator=draw).square()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = model.encoder(pictures).float()
            decoded = model.decoder(latents + noise * torch.randn(latents.shape, generator=draw)).float()
        loss = reconstruction_loss(decoded, pictures)
        loss.backward()
        return loss

    def evaluate(_: int) -> str:
        return f"PSNR {psnr(model, seed):.2f} dB"

    matrices = optimisers(model.decoder.named_parameters(), lambda name: "original" in name, LR / 2)
    checkpoint, schedule = work / "decoder.safetensors", trapezoid(steps, 50, 0.3)
    run(checkpoint, step, steps, matrices, schedule, {"model": model}, evaluate=evaluate)
    unflatten_kernels(model)
    save_autoencoder(path, model)


def reconstruction_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """L1 and MSE of the pixels, L1 of their differences at distance 1 and 2, L1 of the blurred picture."""
    error = decoded - pictures
    slopes = sum(
        (error[..., d:] - error[..., :-d]).abs().mean() + (error[..., d:, :] - error[..., :-d, :]).abs().mean()
        for d in (1, 2)
    )
    return error.abs().mean() + 2 * error.square().mean() + 0.25 * slopes + 0.5 * F.avg_pool2d(error, 4).abs().mean()


@torch.no_grad()
def psnr(model: "AutoencoderTiny", seed: int, n: int = 64) -> float:
    """Mean PSNR in dB on n whole pictures that training does not see."""
    pictures = render(training_scenes(n, seed, "held-out pictures"))
    decoded = [(model.decoder(model.encoder(2 * p - 1)) + 1) / 2 for p in pictures.split(16)]
    error = (torch.cat(decoded).clamp(0, 1) - pictures).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def _crops(scenes: Scene, draw: torch.Generator) -> Tensor:
    """Random crops in [-1, 1], each flipped with probability one half, (b, 3, CROP, CROP)."""
    pictures = 2 * render(scenes) - 1
    corners = torch.randint(pictures.shape[-1] - CROP + 1, (len(scenes), 2), generator=draw).tolist()
    flips = torch.rand(len(scenes), generator=draw) < 0.5
    crops = [p[:, y : y + CROP, x : x + CROP] for p, (y, x) in zip(pictures, corners, strict=True)]
    crops = [c.flip(-1) if flip else c for c, flip in zip(crops, flips, strict=True)]
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def moments(latents: Tensor) -> Tensor:
    """Distance of each channel's mean from 0 and of its deviation from 1.

    Per batch, although the mean of eight crops varies by itself and punishing its square keeps the deviation a
    little below one: running statistics react late, and the deviation then swings by a factor of two.
    """
    deviation, mean = torch.std_mean(latents, (0, 2, 3))
    return (mean.square() + deviation.clamp(min=0.01).log().square()).mean()
