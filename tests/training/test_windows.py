"""Windows of noise levels."""

import math

import pytest
import torch

from stylewright.training.windows import Window, style_window


def strengths(window, *levels):
    return window.strength(torch.tensor(levels)).tolist()


def test_at_once():
    window = Window(-4.0, -2.0)
    assert strengths(window, -math.inf, -4.1, -4.0, -3.0, -2.0, math.inf) == [0, 0, 1, 1, 0, 0]
    assert strengths(Window(high=-2.0, outside=0.25), -math.inf, -2.0) == [1, 0.25]
    assert strengths(Window(), -math.inf, 0.0, math.inf) == [1, 1, 1]


def test_an_edge_is_a_line_centred_on_the_end():
    window = Window(-4.0, 0.0, edge=2.0, outside=-1.0)
    assert strengths(window, -5.0, -4.5, -4.0, -3.0, -1.0, 0.5, 1.0) == [-1, -0.5, 0, 1, 1, -0.5, -1]
    levels = torch.linspace(-10, 10, 4001)
    whole = [Window(-4.0, 0.0, edge=edge).strength(levels).sum().item() for edge in (0.0, 3.0)]
    assert whole[0] == pytest.approx(whole[1], rel=1e-3)


def test_the_paper_s_window_is_carried_to_the_size_of_the_picture():
    assert style_window(None).carried(64) == Window(high=-6.52)
    assert style_window(4096).carried(64).high == pytest.approx(-6.52 + math.log(64))
    assert style_window(4096).carried(4096).high == -6.52


@pytest.mark.parametrize(
    ("ends", "edge"), [((1.0, 1.0), 0), ((2.0, 1.0), 0), ((0.0, 1.0), -1.0), ((0.0, 1.0), math.inf)]
)
def test_windows_without_an_inside_are_errors(ends, edge):
    with pytest.raises(ValueError, match="expected"):
        Window(*ends, edge=edge)


def test_what_a_model_reaches():
    assert not style_window(None).reaches(-5.36, 7.07)
    assert Window(high=-5.3).reaches(-5.36, 7.07) and Window(high=-6.0, edge=2.0).reaches(-5.36, 7.07)
    assert not Window(low=7.1).reaches(-5.36, 7.07)
