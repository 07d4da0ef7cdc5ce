"""Stage 3: the transformer and its text encoder, by flow matching on the latents."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...densities import Mixture, Normal, UniformTime, stratified_uniform
from ...formats.state import write_atomically
from ...hosts.attention import PlainAttention
from ...hosts.flux import FluxDenoiser
from ...noise import add_noise
from ...predictions import target
from ...randomness import generator
from ..autoencoder import load_autoencoder
from ..text import TextEncoder
from ..transformer import new_transformer, save_transformer
from .latents import LatentPool
from .prompts import prompts
from .stage import Cycle, moving_average, optimisers, restarts, run

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

logger = logging.getLogger(__name__)

# Steps and peak of the learning rate: warm-up, plateau and decay to zero, then once more at half the height.
CYCLES = ((5000, 1.0), (3000, 0.5))
BATCH = 32
LR = 2e-3
# High noise from the start: what the text says is decided there (t is 80 % sigmoid(N(0.8, 1.2)), 20 % uniform).
DENSITY = Mixture((Normal(-1.6, 2.4), UniformTime()), (0.8, 0.2))


class TextToImage(nn.Module):
    """The two networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.text_encoder = new_transformer(), TextEncoder()
        start_at_zero(self.transformer)


def start_at_zero(transformer: "FluxTransformer2DModel") -> None:
    """Zeroes the modulations and the last layer, so that every block starts as the identity (adaLN-Zero, DiT)."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and (name == "proj_out" or ".norm" in f".{name}"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def train_transformer(work: Path, out: Path, *, seed: int, cycles: Sequence[Cycle] = CYCLES) -> None:
    """Trains both networks and saves their averages in the folder ``out``, which holds the autoencoder."""
    torch.manual_seed(seed)  # the process is this command's own: layers draw their initial weights globally
    model = TextToImage()
    average = moving_average(model, 0.999)
    denoiser = FluxDenoiser(model.transformer)
    pool = LatentPool(work, load_autoencoder(out / "autoencoder.safetensors"), seed)

    def step(i: int) -> Tensor:
        draw = generator(seed, "transformer", i)
        x0, attributes = pool.batch(i, BATCH)
        log_snr = DENSITY.icdf(stratified_uniform(BATCH, draw))
        eps = torch.randn(x0.shape, generator=draw)
        with PlainAttention(), torch.autocast("cpu", torch.bfloat16):
            context, pooled = model.text_encoder(prompts(attributes, draw))
            conditioning = {"context": context, "pooled": pooled}
            flow = denoiser(add_noise("flow", x0, eps, log_snr), log_snr, conditioning)
        loss = (flow - target("flow", "flow", x0, eps, log_snr)).square().mean()
        loss.backward()
        return loss

    def step_and_average(i: int) -> Tensor:
        if i:  # the optimisers moved the weights after the last step
            average.update_parameters(model)
        return step(i)

    matrices = optimisers(model.named_parameters(), is_block_matrix, LR)
    parts = {"model": model, "average": average}
    steps = sum(length for length, _ in cycles)
    run(work / "transformer.safetensors", step_and_average, steps, matrices, restarts(cycles), parts)
    model.load_state_dict(average.module.state_dict())
    save_transformer(out / "transformer.safetensors", model.transformer)
    state = {key: value.to(torch.bfloat16) for key, value in model.text_encoder.state_dict().items()}
    write_atomically(out / "text_encoder.safetensors", lambda temporary: save_file(state, temporary))


def is_block_matrix(name: str) -> bool:
    """The matrices inside the blocks, without their modulations."""
    return "transformer_blocks." in name and ".norm" not in name
