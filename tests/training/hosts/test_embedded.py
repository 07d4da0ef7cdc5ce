"""The embedded model as a host, with random weights in place of the shipped ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylewright.training.embedded.autoencoder import new_autoencoder, save_autoencoder
from stylewright.training.embedded.text import TextEncoder
from stylewright.training.embedded.transformer import new_transformer, save_transformer
from stylewright.training.embedded.vocabulary import STYLE_NAMES
from stylewright.training.embedded.weights import Weights
from stylewright.training.hosts import embedded
from stylewright.training.hosts.embedded import load_embedded
from stylewright.training.hosts.generate import generate
from stylewright.training.hosts.loading import load_host

PROMPTS = ["star in ocean stripes style", "tree in jazz style", ""]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    weights = Weights(tmp_path_factory.mktemp("embedded"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_transformer(weights.transformer, new_transformer(), torch.float32)
        save_autoencoder(weights.autoencoder, new_autoencoder(), torch.float32)
        save_file({key: value.clone() for key, value in TextEncoder().state_dict().items()}, weights.text_encoder)
    return weights


@pytest.fixture(scope="module")
def host(weights):
    return load_embedded(weights)


def test_shapes(host):
    latents = host.encode_images(torch.rand(2, 3, 32, 48))
    assert latents.shape == (2, host.latent_channels, 4, 6)
    pictures = host.decode_latents(latents)
    assert pictures.shape == (2, 3, 32, 48)
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert {name: tuple(value.shape) for name, value in host.encode_prompts(PROMPTS).items()} == {
        "context": (3, 8, 128),
        "pooled": (3, 128),
    }
    prediction = host.denoiser(latents, torch.tensor([-6.0, 1.0]), host.encode_prompts(PROMPTS[:2]))
    assert prediction.shape == latents.shape


def test_nothing_needs_a_gradient_and_the_global_generator_is_untouched(weights):
    before = torch.get_rng_state()
    host = load_embedded(weights)
    assert generate(host, ["star in jazz style"], seed=0, steps=1, size=(32, 48)).shape == (1, 3, 32, 48)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in host.denoiser.module.parameters())
    assert not host.encode_prompts(PROMPTS)["context"].requires_grad


def test_the_file_is_what_diffusers_was_given(weights, host):
    from stylewright.training.formats.keys_flux import flux_to_diffusers

    state = load_file(weights.transformer)
    assert not any("guidance_in" in key for key in state)  # ComfyUI takes it for the schnell variant
    expected, loaded = flux_to_diffusers(state), host.denoiser.module.state_dict()
    assert loaded.keys() == expected.keys() == new_transformer().state_dict().keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_the_model_can_be_half_precision_while_the_encoders_are_not(weights):
    host = load_embedded(weights, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in host.denoiser.module.parameters()} == {torch.bfloat16}
    assert host.encode_images(torch.rand(1, 3, 16, 32)).dtype == torch.float32
    assert host.encode_prompts(PROMPTS)["context"].dtype == torch.float32


def test_unknown_words_are_named_and_the_known_ones_listed(host):
    with pytest.raises(ValueError, match=r"does not know 'giraffe', 'velvet'\..*<v0>.* subjects circle") as caught:
        host.encode_prompts(["giraffe in velvet style", "star in jazz style"])
    assert all(name in str(caught.value) for name in STYLE_NAMES)


def test_load_host_opens_it_by_name(weights, monkeypatch):
    monkeypatch.setattr(embedded, "Weights", lambda: weights)
    assert load_host("embedded", dtype=torch.float64).name == "embedded"


def test_files_that_are_missing_or_foreign(weights, tmp_path):
    broken = Weights(tmp_path)
    with pytest.raises(ValueError, match=r"transformer\.safetensors is missing"):
        load_embedded(broken)
    for path in (weights.transformer, weights.autoencoder, weights.text_encoder):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken.text_encoder.write_bytes(weights.text_encoder.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot read the weights in"):
        load_embedded(broken)
    broken.text_encoder.write_bytes(weights.autoencoder.read_bytes())
    with pytest.raises(ValueError, match="cannot read the weights in"):
        load_embedded(broken)
