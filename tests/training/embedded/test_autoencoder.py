"""The autoencoder's file against TAESD, written out here as ComfyUI reads it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stylewright.training.embedded.autoencoder import (
    LATENT_CHANNELS,
    load_autoencoder,
    new_autoencoder,
    save_autoencoder,
)
from stylewright.training.embedded.pretrain.autoencoder import psnr

FLUX = {"scale": 0.3611, "shift": 0.1159}  # comfy.latent_formats.Flux


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        convs = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*convs[:-1])

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


def conv(channels_in, channels_out, **options):
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options)


class TAESD(nn.Module):
    """github.com/madebyollin/taesd, with the two numbers that a file may bring along. Pictures are in [0, 1]."""

    def __init__(self):
        super().__init__()
        down = [part for _ in range(3) for part in (conv(64, 64, stride=2, bias=False), Block(), Block(), Block())]
        up = [part for _ in range(3) for part in (Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv64())]
        self.taesd_encoder = nn.Sequential(conv(3, 64), Block(), *down, conv(64, LATENT_CHANNELS))
        self.taesd_decoder = nn.Sequential(Clamp(), conv(LATENT_CHANNELS, 64), nn.ReLU(), *up, Block(), conv(64, 3))
        self.vae_scale, self.vae_shift = (nn.Parameter(torch.tensor(value)) for value in (1.0, 0.0))

    def encode(self, pictures):
        return self.taesd_encoder(pictures) / self.vae_scale + self.vae_shift

    def decode(self, z):
        return self.taesd_decoder((z - self.vae_shift) * self.vae_scale)


def conv64():
    return conv(64, 64, bias=False)


@pytest.fixture(scope="module")
def autoencoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return new_autoencoder().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def taesd(autoencoder, tmp_path_factory):
    """TAESD with our file's weights, every one of them."""
    path = tmp_path_factory.mktemp("autoencoder") / "autoencoder.safetensors"
    save_autoencoder(path, autoencoder, torch.float32)
    model = TAESD().requires_grad_(False)
    model.load_state_dict(load_file(path))
    return model


def pictures():
    return torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))


def test_the_file_is_a_taesd_with_the_same_pictures(autoencoder, taesd):
    latents = autoencoder.encode(2 * pictures() - 1).latents
    assert latents.shape == (2, LATENT_CHANNELS, 3, 5)
    torch.testing.assert_close(taesd.taesd_encoder(pictures()), latents, atol=1e-5, rtol=1e-4)
    decoded = autoencoder.decode(latents).sample
    torch.testing.assert_close(2 * taesd.taesd_decoder(latents) - 1, decoded, atol=1e-5, rtol=1e-4)


def test_comfyuis_flux_latents_are_the_encoders_output(autoencoder, taesd):
    """ComfyUI keeps z and gives the model (z - shift) * scale, by its FLUX latent format."""
    z = taesd.encode(pictures())
    latents = (z - FLUX["shift"]) * FLUX["scale"]
    torch.testing.assert_close(latents, autoencoder.encode(2 * pictures() - 1).latents, atol=1e-5, rtol=1e-4)
    z = latents / FLUX["scale"] + FLUX["shift"]
    torch.testing.assert_close(2 * taesd.decode(z) - 1, autoencoder.decode(latents).sample, atol=1e-4, rtol=1e-3)


def test_saving_and_loading_are_inverses(autoencoder, tmp_path):
    path = tmp_path / "deep" / "autoencoder.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        save_autoencoder(path, autoencoder, dtype)
        loaded, expected = load_autoencoder(path).state_dict(), autoencoder.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key].to(dtype).float()) for key in expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_file_is_half_the_size_but_for_its_two_numbers(autoencoder, tmp_path):
    save_autoencoder(tmp_path / "a.safetensors", autoencoder)
    state = load_file(tmp_path / "a.safetensors")
    numbers = {key: value for key, value in state.items() if value.dtype != torch.bfloat16}
    assert numbers == {"vae_scale": torch.tensor(FLUX["scale"]), "vae_shift": torch.tensor(FLUX["shift"])}


def test_what_is_loaded_is_frozen(autoencoder, tmp_path):
    save_autoencoder(tmp_path / "a.safetensors", autoencoder)
    loaded = load_autoencoder(tmp_path / "a.safetensors")
    assert not loaded.training
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, False)}


def test_a_file_of_something_else(tmp_path):
    save_file({"decoder.conv_in.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight.*TAESD"):
        load_autoencoder(tmp_path / "a.safetensors")


def test_the_shipped_one_draws_unseen_pictures(shipped):
    autoencoder = load_autoencoder(shipped.autoencoder)
    assert psnr(autoencoder, seed=123, n=8) > 27


def test_shipped_latents_have_about_unit_variance(shipped_host):
    from stylewright.training.embedded.pretrain.scenes import training_scenes
    from stylewright.training.embedded.renderer import render

    latents = shipped_host.encode_images(render(training_scenes(32, 123)))
    deviation, mean = torch.std_mean(latents, (0, 2, 3))
    assert mean.abs().max() < 0.8
    assert 0.5 < deviation.min() < deviation.max() < 1.5
