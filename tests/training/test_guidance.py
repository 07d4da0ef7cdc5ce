"""The rules against each other, in float64 on random predictions: what the papers' formulas say, and what follows."""

import math

import pytest
import torch

from stylewright.training import noise, predictions
from stylewright.training.guidance import RULES, cfg, combined, consistency, finestyle, styledrop

SHAPE = (3, 4, 5, 6)
SCALES = [(0.0, 0.0), (1.0, 5.5), (2.0, 2.0), (0.7, 0.0), (0.0, 3.5), (-0.5, 6.5)]


def four(seed=0):
    """d^(c), d^(0), d(c), d(0)."""
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.mark.parametrize(("first", "second"), SCALES)
def test_rules_are_the_papers_formulas(first, second):
    d_hat_c, d_hat_0, d_c, d_0 = four()
    formulas = {
        finestyle: d_hat_c + first * (d_hat_c - d_c) + second * (d_hat_c - d_hat_0),
        styledrop: d_hat_c + first * (d_hat_c - d_c) + second * (d_c - d_0),
        consistency: d_0 + first * (d_c - d_0) + second * (d_hat_c - d_c),
    }
    for rule, expected in formulas.items():
        torch.testing.assert_close(combined(rule(first, second).weights, four()), expected)
    torch.testing.assert_close(combined(cfg(first).weights, four()), d_hat_0 + first * (d_hat_c - d_hat_0))


@pytest.mark.parametrize(("first", "second"), SCALES)
@pytest.mark.parametrize("rule", [finestyle, styledrop, consistency])
def test_weights_sum_to_1(rule, first, second):
    assert sum(rule(first, second).weights) == pytest.approx(1)
    assert sum(rule(first, second).times(0.3, 0.8).weights) == pytest.approx(1)


@pytest.mark.parametrize("l2", [0.0, 3.5, 6.5])
def test_finestyle_without_its_first_scale_is_cfg_of_the_adapted_model(l2):
    assert finestyle(0, l2) == cfg(1 + l2)


@pytest.mark.parametrize(("l1", "l2"), SCALES)
def test_where_the_adapter_changes_nothing_finestyle_is_plain_cfg(l1, l2):
    d_hat_c, d_hat_0, _, _ = four()
    same = (d_hat_c, d_hat_0, d_hat_c, d_hat_0)
    for rule in (finestyle, styledrop):
        torch.testing.assert_close(combined(rule(l1, l2).weights, same), combined(cfg(1 + l2).weights, same))


def test_consistency_guidance_is_styledrop():
    assert consistency(7.5, 3.0) == styledrop(2.0, 6.5)


@pytest.mark.parametrize(("l1", "l2"), SCALES)
def test_finestyle_differs_from_styledrop_by_whose_answer_to_the_prompt_grows(l1, l2):
    d_hat_c, d_hat_0, d_c, d_0 = four()
    difference = combined(finestyle(l1, l2).weights, four()) - combined(styledrop(l1, l2).weights, four())
    torch.testing.assert_close(difference, l2 * ((d_hat_c - d_hat_0) - (d_c - d_0)))


@pytest.mark.parametrize("process", noise.PROCESSES)
@pytest.mark.parametrize("rule", [finestyle, styledrop, consistency])
def test_a_rule_means_the_same_in_every_prediction(process, rule):
    """Guidance of eps, v or flow, turned into data, is guidance of the data."""
    weights, (x_t, *_) = rule(1.3, 4.2).weights, four(1)
    log_snr = torch.tensor([-3.0, 0.5, 2.0])
    data = four()
    expected = combined(weights, data)
    for kind in predictions.PREDICTIONS:
        each = [predictions.convert(d, "x0", kind, process, x_t, log_snr) for d in data]
        found = predictions.convert(combined(weights, each), kind, "x0", process, x_t, log_snr)
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("guidance", "needed"),
    [
        (cfg(1.0), "a"), (cfg(4.0), "aA"), (finestyle(1.0, 0.0), "ab"), (finestyle(0.5, 3.0), "aAb"),
        (styledrop(2.0, 6.5), "abB"), (styledrop(2.0, 0.0), "ab"), (styledrop(2.0, 2.0), "aB"),
        (consistency(7.5, 0.0), "bB"), (consistency(1.0, 1.0), "a"), (consistency(1.0, 0.0), "b"),
    ],
)  # fmt: skip
def test_only_what_has_a_weight_is_needed(guidance, needed):
    assert "".join(letter for letter, weight in zip("aAbB", guidance.weights, strict=True) if weight) == needed
    only = [each if weight else None for each, weight in zip(four(), guidance.weights, strict=True)]
    torch.testing.assert_close(combined(guidance.weights, only), combined(guidance.weights, four()))


@pytest.mark.parametrize(("first", "second"), SCALES)
@pytest.mark.parametrize("rule", [finestyle, styledrop, consistency])
def test_a_rule_is_cfg_in_one_model_and_added_style(rule, first, second):
    """Which is how it is sampled, so that whatever acts on CFG acts on its text part."""
    guidance, (d_hat_c, d_hat_0, d_c, d_0) = rule(first, second), four()
    prompt, null = (d_c, d_0) if guidance.of_base else (d_hat_c, d_hat_0)
    found = null + (1 + guidance.text) * (prompt - null) + guidance.added_style * (d_hat_c - d_c)
    torch.testing.assert_close(found, combined(guidance.weights, four()))


def test_a_factor_fades_to_the_adapted_model():
    assert finestyle(1.0, 4.0).times(0, 0).weights == styledrop(1.0, 4.0).times(0, 0).weights == (1, 0, 0, 0)
    assert finestyle(1.0, 4.0).times(0.5, 0.25) == finestyle(0.5, 1.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scales_are_numbers(scale):
    for rule in RULES.values():
        with pytest.raises(ValueError, match="expected finite"):
            rule(*[scale] * (1 if rule is cfg else 2))
