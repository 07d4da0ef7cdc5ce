"""Signed distances against those that geometry gives."""

import math

import pytest
import torch

from stylewright.training.embedded.outlines import REACH, distance_fields, outlines, polygon_distance
from stylewright.training.embedded.renderer import SUBJECTS


def points(n=4000, reach=2.0):
    return reach * (2 * torch.rand(n, 2, generator=torch.Generator().manual_seed(0)) - 1)


def shoelace(vertices):
    """Area of a simple polygon, positive where it turns clockwise on a canvas with y downwards."""
    (x, y), (after_x, after_y) = vertices.T.double(), vertices.roll(-1, 0).T.double()
    return float((x * after_y - after_x * y).sum() / 2)


def test_a_square():
    half, p = 0.78, points()
    outside = (p.abs() - half).clamp(min=0).norm(dim=1)
    inside = (p.abs() - half).amax(1).clamp(max=0)
    torch.testing.assert_close(polygon_distance(p, outlines()["square"]), outside + inside, atol=1e-6, rtol=0)


def test_a_circle():
    """A polygon of 96 sides lies inside its circle, by at most the height of a segment."""
    radius, p = 0.88, points()
    excess = polygon_distance(p, outlines()["circle"]) - (p.norm(dim=1) - radius)
    height = radius * (1 - math.cos(math.pi / 96))
    assert -1e-6 <= excess.min() < excess.max() <= height + 1e-6


@pytest.mark.parametrize("turned", [False, True])
def test_the_direction_of_the_corners_does_not_matter(turned):
    star = outlines()["star"]
    expected = polygon_distance(points(), star)
    torch.testing.assert_close(polygon_distance(points(), star.flip(0).roll(3, 0) if turned else star), expected)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_outline_has_its_area_and_its_slope(name):
    """The cells inside make up the polygon's area, and nowhere does the distance change faster than the place."""
    resolution = 320
    field = distance_fields(SUBJECTS)[SUBJECTS.index(name)]
    cell = 2 * REACH / resolution
    area = abs(shoelace(outlines()[name]))
    assert (0.5 - field / cell).clamp(0, 1).sum() * cell**2 == pytest.approx(area, rel=0.005)
    slopes = torch.cat([field.diff(dim=0).flatten(), field.diff(dim=1).flatten()]) / cell
    assert slopes.abs().max() < 1.001
    assert field[[0, -1]].min() > 1 and field[:, [0, -1]].min() > 1  # nothing of it is cut off


def test_the_outlines_differ_and_are_about_as_large():
    areas = {name: abs(shoelace(vertices)) for name, vertices in outlines().items()}
    assert areas.keys() == set(SUBJECTS)
    assert 0.8 < min(areas.values()) < max(areas.values()) < 3
    fields = distance_fields(SUBJECTS)
    for i in range(len(SUBJECTS)):
        overlap, union = (fields[i] < 0) & (fields < 0), (fields[i] < 0) | (fields < 0)
        share = overlap.sum((1, 2)) / union.sum((1, 2))
        assert share[i] == 1 and share[torch.arange(len(SUBJECTS)) != i].max() < 0.9


def test_rows_run_downwards_and_columns_to_the_right():
    house, arrow = distance_fields(("house", "arrow"))
    middle = house.shape[0] // 2

    def at(field, x, y):
        return field[int(middle + y / REACH * middle), int(middle + x / REACH * middle)]

    assert at(house, 0, -0.9) < 0 < at(house, 0, 0.95)  # the gable is up
    assert at(arrow, 0.95, 0) < 0 < at(arrow, -1.1, 0)  # the head is right
