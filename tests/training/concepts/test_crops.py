"""Crops: the shares of wholes and parts, and what each shows."""

from collections import Counter

import pytest
import torch

from stylewright.training.concepts.boxes import Box
from stylewright.training.concepts.crops import CropOptions, crops_of, enlarged, items_of, share_of_wholes, sights
from stylewright.training.concepts.phrases import Phrases

PHRASES = Phrases("a star and a house in red chalk, on grey paper", ("a star", "a house"), ("red chalk", "grey paper"))
BOXES = {"a star": Box(0, 0, 20, 20), "a house": Box(30, 10, 60, 40)}
PICTURE = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.4, 0.25, 0.9])
@pytest.mark.parametrize("variants", [1, 4])
def test_the_whole_has_its_share_and_the_others_are_even(share, variants):
    options = CropOptions(full_share=share, variants=variants)
    items = items_of(PICTURE, PHRASES, crops_of(BOXES, 48, 64, options, seed=0), options)
    assert share_of_wholes(items) == pytest.approx(share, abs=1e-12)
    seen = Counter()
    for item in items[1:]:
        seen[item.caption] += item.repeats
    assert set(seen) == {f"{what} in {how} style" for what in PHRASES.content for how in PHRASES.style}
    assert len(set(seen.values())) == 1
    assert items[0].caption == PHRASES.prompt and torch.equal(items[0].image, PICTURE)


def test_crops_with_few_pixels_are_named():
    assert enlarged(BOXES, 80) == ""
    assert "enlarged more than 4 times for training at 96 show little but blur: a star (20x20)." in enlarged(BOXES, 96)
    with pytest.raises(ValueError, match="a crop of 'a star' has 7x9 pixels, too little to learn from: expected at"):
        crops_of({"a star": Box(0, 0, 7, 9)}, 48, 64, CropOptions(), seed=0)


def test_one_of_each():
    assert sights(8, None) == (1, 1) and sights(6, 0.4) == (4, 1) and sights(1, 0.4) == (2, 3)


def test_the_first_crop_is_the_box_and_the_others_are_near():
    crops = crops_of(BOXES, 48, 64, CropOptions(variants=3), seed=0)
    assert [crop.box for crop in crops if crop.number == 0] == list(BOXES.values())
    assert len({crop.box for crop in crops}) > 2
    assert (
        crops
        == crops_of(BOXES, 48, 64, CropOptions(variants=3), seed=0)
        != crops_of(BOXES, 48, 64, CropOptions(variants=3), seed=1)
    )
    assert torch.equal(crops[0].of(PICTURE), PICTURE[:, :20, :20])


def test_outside_of_its_place_a_crop_counts_less():
    options = CropOptions(variants=1, outside=0.2)
    place = torch.zeros(48, 64)
    place[:, :10] = 1
    items = items_of(PICTURE, PHRASES, crops_of(BOXES, 48, 64, options, 0), options, {"a star": place})
    masks = {item.caption: item.mask for item in items}
    star = masks["a star in red chalk style"]
    assert bool((star[:, :10] == 1).all()) and torch.allclose(star[:, 10:], torch.tensor(0.2))
    assert masks["a house in red chalk style"] is None and items[0].mask is None


@pytest.mark.parametrize("options", [{"full_share": 1.0}, {"variants": 0}, {"jitter": 0.7}, {"outside": -0.5}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options.values())):g}"):
        CropOptions(**options)
