"""The loss on pictures that are unlike their prompts, with features known in closed form."""

import pytest
import torch

from stylewright.training.errors import IncompatibleCheckpoint
from stylewright.training.hosts.host import Features
from stylewright.training.loops.distil_config import DistilConfig
from stylewright.training.loops.likeness import Likeness, looked_at, unlikeness

from .test_distil import config_of, run

WANTED = torch.tensor([1.0, 0.0, 0.0, 0.0])


def mean_colour(pictures):
    return pictures.mean((2, 3))


LIKENESS = Likeness(
    decode=lambda x0: 3 * x0, features=Features("colour", mean_colour, lambda texts: WANTED.expand(len(texts), -1))
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_same_samples_are_looked_at_however_they_are_dealt_out():
    config = DistilConfig(batch_size=4, accumulation=2, clip_samples=3)
    whole = looked_at(config, slice(0, 8))
    assert whole == [0, 1, 2, 4, 5, 6]
    dealt = [first + place for first in (0, 2, 4, 6) for place in looked_at(config, slice(first, first + 2))]
    assert dealt == whole and looked_at(config, slice(3, 4)) == []
    assert looked_at(DistilConfig(batch_size=4), slice(0, 4)) == [0, 1, 2, 3]


def test_the_gradient_is_that_of_the_cosine_through_decoder_and_features():
    config = DistilConfig(steps=10, batch_size=4, clip_weight=0.2, clip_threshold=1.0, clip_samples=2)
    x0 = draw(4, 4, 2, 3).requires_grad_()
    found = unlikeness(LIKENESS, config, 5, x0, ["", "", "", ""], slice(0, 4))
    found.losses.mean().backward()
    features = 3 * x0.detach()[:2].mean((2, 3))
    size = features.norm(dim=1, keepdim=True)
    cosine = features[:, :1] / size
    by_features = -(WANTED - cosine * features / size) / size
    by_x0 = (
        0.1 / 2 * (3 / 6) * by_features[:, :, None, None].expand(2, 4, 2, 3)
    )  # half of the run, 2 looked at, 6 cells
    torch.testing.assert_close(x0.grad[:2], by_x0)
    assert not x0.grad[2:].any() and not found.losses[2:].any()
    torch.testing.assert_close(found.losses[:2], 0.1 * 2 * (1 - cosine[:, 0]).detach())
    assert found.cosine.item() == pytest.approx(cosine.mean().item())


def test_passes_of_a_step_add_up_to_the_whole_step():
    config = DistilConfig(steps=10, batch_size=4, clip_weight=0.2, clip_samples=3, clip_threshold=0.9)
    x0 = draw(4, 4, 2, 3)
    whole = unlikeness(LIKENESS, config, 0, x0, [""] * 4, slice(0, 4)).losses
    parts = [unlikeness(LIKENESS, config, 0, x0[i : i + 1], [""], slice(i, i + 1)) for i in range(4)]
    assert parts[3] is None
    torch.testing.assert_close(torch.cat([part.losses for part in parts[:3]]), whole[:3])


def test_pictures_that_are_like_enough_are_left_alone():
    x0 = draw(2, 4, 2, 3).requires_grad_()
    config = DistilConfig(batch_size=2, clip_weight=0.2, clip_threshold=-0.99)
    found = unlikeness(LIKENESS, config, 0, x0, ["", ""], slice(0, 2))
    found.losses.sum().backward()
    assert not found.losses.any() and not x0.grad.any()


def test_pictures_become_like_their_prompts_and_less_so_without_it():
    options = {"steps": 40, "clip_threshold": 0.9, "save_every": 0, "learning_rate": 2e-2}
    with_it = run(likeness=LIKENESS, clip_weight=5.0, **options).history
    cosines = [event.others["likeness"] for event in with_it]
    assert sum(cosines[-5:]) / 5 > sum(cosines[:5]) / 5 + 0.3
    silent = run(likeness=LIKENESS, clip_weight=1e-9, **options).history
    assert cosines[-1] > silent[-1].others["likeness"] + 0.3


def test_no_weight_is_no_loss_bit_for_bit():
    without, unused = run(), run(likeness=LIKENESS)
    assert all(torch.equal(unused.adapter_state[name], tensor) for name, tensor in without.adapter_state.items())
    assert "likeness" not in unused.history[0].others


def test_stopped_and_continued_is_the_run_that_never_stopped(tmp_path):
    options = {"likeness": LIKENESS, "clip_weight": 0.5, "clip_threshold": 0.9, "clip_samples": 2}
    whole = run(tmp_path / "whole", **options)

    def stop(event):
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", report=stop, **options)
    again = run(tmp_path / "parts", **options)
    assert all(torch.equal(again.adapter_state[name], tensor) for name, tensor in whole.adapter_state.items())
    other = Likeness(LIKENESS.decode, Features("another", mean_colour, LIKENESS.features.texts))
    with pytest.raises(IncompatibleCheckpoint, match="likeness was 'colour' and is 'another'"):
        run(tmp_path / "parts", **{**options, "likeness": other})
    with pytest.raises(IncompatibleCheckpoint, match="steps was 6 and is 8"):  # its weight would have fallen slower
        run(tmp_path / "parts", steps=8, **options)


def test_a_weight_without_features_is_refused():
    with pytest.raises(ValueError, match="nothing that compares"):
        run(clip_weight=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_weight": -0.1}, "clip_weight=-0.1"),
        ({"clip_threshold": 1.5}, "a cosine"),
        ({"clip_samples": 5}, "no more than batch_size=4"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config_of(**changes)
