from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stylewright.training.embedded.pretrain import latents
from stylewright.training.embedded.pretrain.latents import ATTRIBUTES, LatentPool
from stylewright.training.embedded.pretrain.scenes import training_scenes
from stylewright.training.embedded.renderer import render


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 7)


@pytest.fixture(scope="module")
def autoencoder():
    """The mean of each square of 8x8 pixels, in sixteen mixtures: the right shapes, at no cost."""
    mixtures = nn.Conv2d(3, 16, 1).requires_grad_(False)
    mixtures.weight.copy_(torch.randn(mixtures.weight.shape, generator=torch.Generator().manual_seed(0)))
    return SimpleNamespace(encoder=nn.Sequential(nn.AvgPool2d(8), mixtures))


@pytest.fixture
def make(autoencoder, tmp_path):
    def pool(folder="work", seed=3):
        (tmp_path / folder).mkdir(exist_ok=True)
        return LatentPool(tmp_path / folder, autoencoder, seed, joins=(0, 10, 20))

    return pool


def test_latents_belong_to_their_attributes(make, autoencoder):
    drawn, attributes = make().batch(0, 40)
    assert drawn.shape == (40, 16, 16, 16) and drawn.dtype == torch.float32
    assert attributes.shape == (40, 5)
    scenes = training_scenes(7, 3, "latents", 0, named=0.25)
    expected = autoencoder.encoder(2 * render(scenes) - 1)
    rows = torch.stack([getattr(scenes, name) for name in ATTRIBUTES], 1)
    nearest = torch.cdist(drawn.flatten(1), expected.flatten(1)).argmin(1)
    assert nearest.unique().numel() == 7  # 40 draws of seven
    assert torch.equal(rows[nearest], attributes)
    scale = expected.std()
    assert (drawn - expected[nearest]).abs().max() < 0.1 * scale  # bfloat16


def test_a_batch_is_a_function_of_the_step_alone(make):
    ahead, behind = make("a"), make("b")
    later = ahead.batch(25, 6)  # draws all three shards at once
    batches = [behind.batch(step, 6) for step in (0, 9, 25)]
    for one, other in zip((ahead.batch(0, 6), ahead.batch(9, 6), later), batches, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert not torch.equal(batches[0][0], batches[1][0])


def test_the_pool_grows_with_the_steps_and_stops(make, tmp_path):
    pool = make()
    for step, shards in ((0, 1), (9, 1), (10, 2), (20, 3), (500, 3)):
        pool.batch(step, 2)
        assert len(list((tmp_path / "work").iterdir())) == shards


def test_shards_on_disk_are_taken_up(make, monkeypatch):
    expected = make().batch(15, 6)

    def forbidden(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(LatentPool, "_draw", forbidden)
    assert torch.equal(make().batch(15, 6)[0], expected[0])


def test_another_seed_has_other_pictures(make):
    assert not torch.equal(make("a").batch(0, 6)[0], make("b", seed=4).batch(0, 6)[0])
