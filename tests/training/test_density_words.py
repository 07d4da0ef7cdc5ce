"""The words say how noisy a law's draws are, by the law itself, and leave its figures whole."""

import math
import re

import pytest
import torch

from stylewright.training import densities as d
from stylewright.training.density_presets import DENSITIES, DensityConfig, build_density, preset_name
from stylewright.training.density_words import in_words, read_law

SHARES = torch.tensor([0.01, 0.3, 0.5, 0.7, 0.99], dtype=torch.float64)
BUILT = {name: build_density(DensityConfig(name), (-math.inf, math.inf), 4096) for name in DENSITIES}
TABLES = {"schedule-sd"}  # a table tells its ends only


@pytest.mark.parametrize("name", BUILT.keys() - TABLES)
def test_a_law_is_read_back_from_what_it_says(name):
    found = read_law(BUILT[name].describe())
    assert torch.equal(found.icdf(SHARES), BUILT[name].icdf(SHARES))


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (d.Normal(-6, 2), "mostly very noisy (half of the steps at 91 to 98 % noise)"),
        (d.Normal(-2.2, 2), "mostly noisy (half of the steps at 60 to 86 % noise)"),
        (d.UniformTime(), "half noise, half picture (half of the steps at 25 to 75 % noise)"),
        (d.Normal(6, 2), "mostly clean (half of the steps at 2 to 9 % noise)"),
        (d.Normal(-40, 1), "mostly very noisy (half of the steps at 100 % noise)"),
    ],
)
def test_words_come_first_and_figures_stay_whole(law, words):
    assert in_words(law.describe()) == f"{words}; exactly: {d.sentence(law.describe())}"
    assert in_words(law.describe(), "a name").startswith(f"a name, {words}; exactly: ")


def test_the_amount_follows_the_law():
    """More noise in the draws, more noise in the words: the quartiles named are the law's own."""
    seen = [in_words(d.Normal(mu, 2).describe()) for mu in range(-10, 11)]
    first = [float(re.search(r"at ([\d.]+)", text)[1]) for text in seen]
    assert first == sorted(first, reverse=True)
    order = ["mostly very noisy", "mostly noisy", "half noise", "mostly clean"]
    kinds = [next(n for n, words in enumerate(order) if text.startswith(words)) for text in seen]
    assert kinds == sorted(kinds) and set(kinds) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "law", [{}, {"law": "newer", "x": 1}, {"law": "normal"}, {"law": "shifted", "of": {}}, {"a": 1}]
)
def test_a_law_that_is_not_known_is_given_as_it_is(law):
    whole = {"newer": "newer x=1", "normal": "normal", "shifted": str(law), None: str(law) if law else ""}
    assert in_words(law) == whole[law.get("law")]
    assert "schedule-percent" in in_words(DENSITIES["schedule-sd"].describe(), "schedule-sd")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"preset": "style-friendly", "mu": None, "sigma": None}, "style-friendly"),
        ({"preset": "style-friendly", "mu": -6.0, "sigma": 2.0}, "style-friendly"),
        ({"preset": "style-friendly", "mu": -3.0}, ""),
        ({"preset": "of a newer version"}, ""),
        ({}, ""),
    ],
)
def test_a_preset_has_its_name_while_it_is_unchanged(config, name):
    assert preset_name(config) == name
