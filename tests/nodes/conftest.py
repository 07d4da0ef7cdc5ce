"""ComfyUI's side of the tests: tiny random models of every family, and an embedded model of random weights."""

import gc
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# Importable without a folder on sys.path.
NAMES = (
    "stored_models",
    "stored_steps",
    "training_runs",
    "tiny_models",
    "stored_files",
    "one_step_runs",
    "negative_proof",
    "joint_proof",
)
for name in NAMES:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

from tiny_models import TINY, TinyClip, tiny_conditioning, tiny_model  # noqa: E402


@pytest.fixture(autouse=True)
def no_garbage_of_tests_before():
    """ComfyUI looks through all objects there are when a model is left in a cycle of references, as by most tests.

    So these go now, and what stays, such as modules, is not looked through again: that took half of the time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny():
    """``tiny("flux")`` makes a loaded-like MODEL."""
    return tiny_model


@pytest.fixture
def tiny_clip():
    """``tiny_clip("flux")`` makes what a CLIP is to a prompt table."""
    return TinyClip


@pytest.fixture
def tiny_prompt():
    """``tiny_prompt("flux", tokens, seed)`` makes a CONDITIONING."""
    return tiny_conditioning


@pytest.fixture
def latent_channels():
    return {family: tiny.channels for family, tiny in TINY.items()}


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> Path:
    """Files like the shipped ones, of random weights."""
    from safetensors.torch import save_file

    from stylewright.training.embedded.autoencoder import new_autoencoder, save_autoencoder
    from stylewright.training.embedded.text import TextEncoder
    from stylewright.training.embedded.transformer import new_transformer, save_transformer

    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(11)
        transformer, autoencoder, encoder = new_transformer(), new_autoencoder(), TextEncoder()
    save_transformer(folder / "transformer.safetensors", transformer)
    save_autoencoder(folder / "autoencoder.safetensors", autoencoder)
    save_file(encoder.state_dict(), folder / "text_encoder.safetensors")
    return folder


@pytest.fixture
def embedded(random_weights):
    """MODEL, CLIP and VAE of the random weights, loaded as a node loads them."""
    from stylewright.nodes.bridge.embedded import load_embedded
    from stylewright.training.embedded.weights import Weights

    with torch.inference_mode():
        return load_embedded(Weights(random_weights))
