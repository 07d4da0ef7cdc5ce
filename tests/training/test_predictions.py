import math

import pytest
import torch

from stylewright.training import noise, predictions

KINDS = list(predictions.PREDICTIONS)
PROCESSES = list(noise.PROCESSES)
LEVELS = torch.linspace(-8, 8, 9, dtype=torch.float64)  # batch 9, against height 5 and width 6


def world(process):
    """x0, eps and x_t (9, 2, 5, 6) in float64 at ``LEVELS``."""
    x0, eps = torch.randn(2, 9, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x0, eps, noise.add_noise(process, x0, eps, LEVELS)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_perfect_prediction_gives_back_data_and_noise(prediction, process):
    x0, eps, x_t = world(process)
    pred = predictions.target(prediction, process, x0, eps, LEVELS)
    data, unit = predictions.to_x0_eps(prediction, pred, process, x_t, LEVELS)
    torch.testing.assert_close(data, x0, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(unit, eps, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("goal", KINDS)
@pytest.mark.parametrize("process", PROCESSES)
def test_any_answer_converts_to_any_prediction_and_back(source, goal, process):
    """Also for an answer that is wrong: the two forms always imply the same data and noise."""
    _, _, x_t = world(process)
    answer = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    converted = predictions.convert(answer, source, goal, process, x_t, LEVELS)
    back = predictions.convert(converted, goal, source, process, x_t, LEVELS)
    torch.testing.assert_close(back, answer, atol=1e-9, rtol=1e-9)
    for one, other in zip(
        predictions.to_x0_eps(source, answer, process, x_t, LEVELS),
        predictions.to_x0_eps(goal, converted, process, x_t, LEVELS),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_targets_are_the_papers():
    x0, eps, _ = world("vp")
    alpha, sigma = (part.reshape(9, 1, 1, 1) for part in noise.alpha_sigma("vp", LEVELS))
    expected = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    for prediction, answer in expected.items():
        torch.testing.assert_close(predictions.target(prediction, "vp", x0, eps, LEVELS), answer)


def test_v_converts_by_the_formulas_of_its_paper():
    """x0 = alpha x_t - sigma v and eps = sigma x_t + alpha v, arXiv 2202.00512, for variance preserving processes."""
    _, _, x_t = world("vp")
    v = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha, sigma = (part.reshape(9, 1, 1, 1) for part in noise.alpha_sigma("vp", LEVELS))
    data, unit = predictions.to_x0_eps("v", v, "vp", x_t, LEVELS)
    torch.testing.assert_close(data, alpha * x_t - sigma * v)
    torch.testing.assert_close(unit, sigma * x_t + alpha * v)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("process", ["flow", "vp"])
def test_the_ends_stay_finite_and_the_predicted_side_exact(prediction, process):
    x0, eps = torch.randn(2, 2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([-math.inf, math.inf])
    x_t = noise.add_noise(process, x0, eps, ends)
    assert torch.equal(x_t[0], eps[0]) and torch.equal(x_t[1], x0[1])
    pred = predictions.target(prediction, process, x0, eps, ends)
    data, unit = predictions.to_x0_eps(prediction, pred, process, x_t, ends)
    assert data.isfinite().all() and unit.isfinite().all()
    if prediction != "eps":  # at pure noise eps alone says nothing of the data
        torch.testing.assert_close(data, x0, atol=1e-5, rtol=1e-5)
    if prediction != "x0":  # at clean data x0 alone says nothing of the noise
        torch.testing.assert_close(unit, eps, atol=1e-5, rtol=1e-5)


def test_half_precision_predictions_give_float32():
    x_t = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    data, unit = predictions.to_x0_eps("flow", x_t, "flow", x_t, torch.tensor([-6.0, 1.0]))
    assert data.dtype == unit.dtype == torch.float32


def test_unknown_prediction_is_named():
    x0, eps, _ = world("flow")
    with pytest.raises(ValueError, match=r"'epsilon'.*x0, eps, v, flow"):
        predictions.target("epsilon", "flow", x0, eps, LEVELS)
