"""Boxes: around what was planted, padded, square, of a least side, inside the picture."""

import numpy as np
import pytest
import torch

from stylewright.training.concepts.boxes import (
    Box,
    BoxOptions,
    around,
    as_crop,
    box_of_map,
    jittered,
    largest_component,
    otsu,
    overlap,
)

SIZE = (96, 128)  # height, width


def planted(*boxes, noise=0.1):
    values = noise * torch.rand(12, 16, generator=torch.Generator().manual_seed(0))
    for left, top, right, bottom in boxes:
        values[top:bottom, left:right] = 1.0
    return values


@pytest.mark.parametrize("rule", ["share", "otsu"])
@pytest.mark.parametrize("place", [(3, 2, 8, 7), (0, 0, 4, 3), (11, 8, 16, 12), (6, 0, 7, 12)])
def test_the_box_is_that_of_the_planted_region(rule, place):
    found = box_of_map(planted(place), *SIZE, BoxOptions(rule=rule))
    truth = Box(*(8 * edge for edge in place))
    for edge in ("left", "top", "right", "bottom"):
        assert abs(getattr(found, edge) - getattr(truth, edge)) <= 5  # of a cell of 8 pixels
    crop = as_crop(found, *SIZE, BoxOptions())
    assert crop.width == crop.height >= 0.3 * 96 - 1
    assert crop.left >= 0 and crop.right <= 128 and crop.top >= 0 and crop.bottom <= 96
    wanted = min(96, max(0.3 * 96, 1.3 * max(found.width, found.height)))
    assert abs(crop.width - wanted) <= 1
    if truth.height < 96:
        assert crop.left <= found.left and crop.right >= found.right
        assert crop.top <= found.top and crop.bottom >= found.bottom


def test_the_larger_of_two_regions_counts():
    found = box_of_map(planted((1, 1, 3, 3), (8, 4, 14, 10)), *SIZE, BoxOptions())
    assert overlap(found, Box(64, 32, 112, 80)) > 0.75
    assert largest_component(np.eye(3, dtype=bool)).sum() == 1  # corners do not hang together


def test_a_map_of_nothing_has_no_box():
    assert box_of_map(torch.zeros(4, 4), *SIZE, BoxOptions()) is None


def test_the_threshold_is_a_share_of_the_largest_value():
    values = torch.zeros(12, 16)
    values[2:6, 2:14] = 0.5
    values[3:5, 4:6] = 1.0
    wide, narrow = (box_of_map(values, *SIZE, BoxOptions(share=share)) for share in (0.3, 0.8))
    assert wide.width > 80 and narrow.width < 24


def test_otsu_parts_two_levels():
    values = np.concatenate([np.full(90, 0.2), np.full(10, 0.9)]) + np.linspace(-0.02, 0.02, 100)
    assert 0.22 < otsu(values) < 0.88


def test_an_own_shape_stays():
    box = Box(40, 20, 80, 60 - 20)
    crop = as_crop(box, *SIZE, BoxOptions(shape="own", least=0.1))
    assert (crop.width, crop.height) == (52, 26)
    assert as_crop(Box(0, 0, 128, 96), *SIZE, BoxOptions(shape="own")) == Box(0, 0, 128, 96)


def test_overlap_is_of_areas():
    assert overlap(Box(0, 0, 4, 4), Box(0, 0, 4, 4)) == 1
    assert overlap(Box(0, 0, 4, 4), Box(2, 0, 6, 4)) == pytest.approx(8 / 24)
    assert overlap(Box(0, 0, 4, 4), Box(4, 0, 8, 4)) == overlap(Box(0, 0, 2, 2), Box(5, 5, 6, 6)) == 0


def test_a_centre_near_an_edge_is_moved_inside():
    assert around(1, 95, 20, 20, *SIZE) == Box(0, 76, 20, 96)
    assert around(64, 48, 500, 500, *SIZE) == Box(0, 0, 128, 96)


def test_jitter_keeps_to_its_amount_and_the_picture():
    box = Box(40, 30, 80, 70)
    for seed in range(50):
        found = jittered(box, *SIZE, torch.Generator().manual_seed(seed), 0.1)
        assert abs(found.width - 40) <= 4 and abs(found.left + found.right - 120) <= 2 * 5
        edge = jittered(Box(0, 0, 96, 96), *SIZE, torch.Generator().manual_seed(seed), 0.5)
        assert edge.left >= 0 and edge.right <= 128 and edge.top >= 0 and edge.bottom <= 96
    assert jittered(box, *SIZE, torch.Generator(), 0.0) == box


@pytest.mark.parametrize(
    "options", [{"rule": "median"}, {"shape": "round"}, {"share": 1.5}, {"padding": -0.1}, {"least": 1.5}]
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options.values()))}"):
        BoxOptions(**options)
