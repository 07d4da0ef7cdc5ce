"""A network and data so small that a training step takes a millisecond."""

import pytest
import torch
from torch import nn

from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.data.dataset import Dataset, Example
from stylewright.training.density_presets import DensityConfig
from stylewright.training.loops.config import TrainConfig

CHANNELS, HEIGHT, WIDTH, CONTEXT = 4, 6, 8, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class ToyNet(nn.Module):
    """Each position by itself: channels, noise level and prompt through residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(CHANNELS + CONTEXT + 1, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.outer = nn.Linear(16, CHANNELS)

    def forward(self, x, time, context):
        h, w = x.shape[2:]
        constant = torch.cat([context, time[:, None]], 1)[:, :, None, None].expand(-1, -1, h, w)
        tokens = torch.cat([x, constant], 1).flatten(2).mT
        tokens = self.inner(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.outer(tokens).mT.unflatten(2, (h, w))


class ToyDenoiser:
    family = "toy"
    process = "flow"
    prediction = "flow"
    log_snr_range = (-15.0, 15.0)

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = ToyNet().eval().requires_grad_(False)

    def __call__(self, x_t, log_snr, conditioning):
        return self.module(x_t, torch.sigmoid(-log_snr / 2), conditioning["context"]).float()


def toy_dataset(count: int = 3, masked: bool = False) -> Dataset:
    source = torch.Generator().manual_seed(1)
    examples = [
        Example(
            name=f"{index}.png",
            latent=torch.randn(CHANNELS, HEIGHT, WIDTH, generator=source) + 1,
            conditioning={"context": torch.randn(1, CONTEXT, generator=source)},
            mask=(torch.rand(1, HEIGHT, WIDTH, generator=source) > 0.5).float() if masked else None,
            caption=f"picture {index} in dotted style",
        )
        for index in range(count)
    ]
    return Dataset(examples, null={"context": torch.zeros(1, CONTEXT)})


def toy_config(**changes) -> TrainConfig:
    defaults = {
        "steps": 8,
        "batch_size": 2,
        "accumulation": 2,
        "learning_rate": 1e-2,
        "save_every": 3,
        "report_every": 2,
        "adapter": AdapterConfig(rank=2),
        "density": DensityConfig(mu=-2.0, sigma=2.0),
    }
    return TrainConfig(**{**defaults, **changes})


@pytest.fixture
def denoiser():
    return ToyDenoiser()


@pytest.fixture
def dataset():
    return toy_dataset()


@pytest.fixture
def make_config():
    return toy_config


@pytest.fixture
def make_dataset():
    return toy_dataset


@pytest.fixture
def run_to(make_config, tmp_path):
    """Trains the toy in a folder of ``tmp_path`` and returns the result and the folder."""
    from stylewright.training.loops.train import train

    def run(name, *, data=None, on=None, report=None, sample=None, **changes):
        folder = tmp_path / name
        result = train(
            on or ToyDenoiser(),
            data or toy_dataset(),
            make_config(**changes),
            run_dir=folder,
            report=report,
            sample=sample,
        )
        return result, folder

    return run
