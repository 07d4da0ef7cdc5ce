"""Prediction errors: a model that draws a thing better where it is, and when it is told of it, gives its place."""

from types import SimpleNamespace

import pytest
import torch

from stylewright.training.concepts.errors import ERROR_LEVELS, error_maps, smooth, without
from stylewright.training.concepts.locate import Search
from stylewright.training.noise import alpha_sigma, expand
from stylewright.training.predictions import target

PLACES = {"a fox": (slice(2, 6), slice(1, 5)), "two trees": (slice(9, 14), slice(8, 15))}
PROMPT = "a fox and two trees in ink style"


def host_of(process: str, prediction: str) -> SimpleNamespace:
    """A model that knows each thing of its prompt in its place, and elsewhere takes the clean picture for zero."""

    class Denoiser:
        family = "sd15"

        def __init__(self):
            self.process, self.prediction = process, prediction

        def __call__(self, x_t, log_snr, conditioning):
            known = conditioning["known"][:, None]
            alpha, sigma = (expand(part, x_t) for part in alpha_sigma(process, log_snr))
            x0 = known * PICTURE
            return target(prediction, process, x0, (x_t - alpha * x0) / sigma, log_snr)

    def encode(prompts):
        known = torch.zeros(len(prompts), 16, 16)
        for row, text in zip(known, prompts, strict=True):
            for phrase, place in PLACES.items():
                row[place] = float(phrase in text)
        return {"known": known}

    return SimpleNamespace(
        denoiser=Denoiser(),
        encode_images=lambda pixels: PICTURE,
        encode_prompts=encode,
        training_conditioning={},
        pixels_per_token=16,
        pixels_per_latent=8,
        device="cpu",
    )


PICTURE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 1.0


@pytest.mark.parametrize(("process", "prediction"), [("flow", "flow"), ("vp", "eps"), ("vp", "v"), ("ve", "eps")])
def test_things_are_found_where_they_are_known(process, prediction):
    calls = []
    maps = error_maps(
        host_of(process, prediction), torch.zeros(3, 128, 128), PROMPT, list(PLACES),
        Search(noises=2), lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (8, 8) and maps.shape == (2, 16, 16) and maps.min() >= 0 and maps.max() <= 1
    assert len(ERROR_LEVELS[process]) == 4 and sorted(ERROR_LEVELS[process], reverse=True) == list(
        ERROR_LEVELS[process]
    )
    for values, place in zip(maps, PLACES.values(), strict=True):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[place] = True
        around = smooth(inside[None].float(), 2)[0] > 0
        assert values[inside].min() > 0 and values[~around].max() == 0


def test_maps_are_means_of_what_is_around_and_never_below_zero():
    maps = torch.full((2, 6, 6), 0.5)
    maps[1] = -0.5
    maps[0, 2, 3] = 9.5
    found = smooth(maps, 2)
    assert found[1].max() == 0  # a phrase that does harm there tells of no place
    assert found[0, 2, 3] == pytest.approx(1.5) and found[0, 1:4, 2:5].unique().numel() == 1
    assert torch.equal(found[0, 0], maps[0, 0]) and torch.equal(smooth(maps, 1), maps.clamp(min=0))


def test_a_phrase_is_taken_out_as_whole_words():
    assert without(PROMPT, "a fox") == "and two trees in ink style"
    assert without("a foxtrot, A  Fox", "a fox") == "a foxtrot,"
    with pytest.raises(ValueError, match="'a hen' is no part of the prompt"):
        without(PROMPT, "a hen")
