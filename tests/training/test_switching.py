"""A switch is a partition of all noise levels."""

import math

import pytest

from stylewright.training.switching import Switch


@pytest.mark.parametrize("edge", [0.0, 1.0, 3.0])
def test_weights_are_a_partition(edge):
    switch = Switch((-4.0, -1.0, 5.0), edge)
    for level in [-math.inf, *(each / 8 for each in range(-80, 80)), math.inf]:
        weights = switch.weights(level)
        assert len(weights) == 4 and min(weights) >= 0 and sum(weights) == pytest.approx(1)
    assert switch.weights(-math.inf) == (1, 0, 0, 0) and switch.weights(math.inf) == (0, 0, 0, 1)


def test_a_cross_fade_is_a_straight_line_around_its_threshold():
    switch = Switch((2.0,), 4.0)
    assert [switch.weights(level)[1] for level in (0, 1, 2, 3, 4)] == [0, 0.25, 0.5, 0.75, 1]
    assert Switch((2.0,)).weights(2.0) == (1, 0), "a threshold is still of the noisier side"


@pytest.mark.parametrize("thresholds", [(), (math.nan,), (1.0, 1.0), (2.0, 1.0), (math.inf,)])
def test_thresholds_that_part_nothing_are_refused(thresholds):
    with pytest.raises(ValueError, match="expected"):
        Switch(thresholds)


@pytest.mark.parametrize("edge", [-1.0, math.nan, math.inf, 1.5])
def test_cross_fades_that_run_into_each_other_are_refused(edge):
    with pytest.raises(ValueError, match="expected"):
        Switch((0.0, 1.0), edge)
