"""An embedded model with random weights, and pictures to learn from."""

import pytest
import torch
from safetensors.torch import save_file

from stylewright.training.embedded.autoencoder import new_autoencoder, save_autoencoder
from stylewright.training.embedded.text import TextEncoder
from stylewright.training.embedded.transformer import new_transformer, save_transformer
from stylewright.training.embedded.weights import Weights


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> Weights:
    weights = Weights(tmp_path_factory.mktemp("embedded"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_transformer(weights.transformer, new_transformer())
        save_autoencoder(weights.autoencoder, new_autoencoder(), torch.float32)
        save_file({key: value.clone() for key, value in TextEncoder().state_dict().items()}, weights.text_encoder)
    return weights


@pytest.fixture
def workplace(tmp_path, monkeypatch, random_weights):
    """An empty current folder, where "embedded" is the random model and ``pictures/`` holds two."""
    from PIL import Image

    from stylewright.training.hosts import embedded

    monkeypatch.setattr(embedded, "Weights", lambda: random_weights)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name, colour in (("star", (200, 30, 40)), ("tree", (20, 90, 60))):
        Image.new("RGB", (64, 48), colour).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(name, encoding="utf-8")
    return tmp_path
