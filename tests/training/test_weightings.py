import math

import pytest
import torch

from stylewright.training import noise, predictions, weightings

KINDS = list(predictions.PREDICTIONS)
PROCESSES = list(noise.PROCESSES)
ON_X0 = ["min-snr-5", "soft-min-snr", "p2", "debiased", "x0"]
LEVELS = torch.linspace(-8, 8, 9, dtype=torch.float64)
SNR = LEVELS.exp()

# As the papers and their implementations print them.
PUBLISHED = {
    ("min-snr-5", "x0", "vp"): SNR.clamp(max=5),
    ("min-snr-5", "eps", "vp"): SNR.clamp(max=5) / SNR,
    ("min-snr-5", "v", "vp"): SNR.clamp(max=5) / (SNR + 1),
    ("soft-min-snr", "x0", "vp"): 5 * SNR / (SNR + 5),
    ("soft-min-snr", "eps", "vp"): 5 / (SNR + 5),
    ("p2", "eps", "vp"): 1 / (1 + SNR),
    ("debiased", "eps", "vp"): SNR**-0.5,
    ("x0", "eps", "vp"): 1 / SNR,
    ("x0", "v", "vp"): 1 / (1 + SNR),
    ("x0", "flow", "flow"): 1 / (1 + SNR.sqrt()) ** 2,  # sigma^2 on the velocity
    ("sigma", "flow", "flow"): (1 + SNR.sqrt()) ** 2,
    ("cosmap", "flow", "flow"): 2 * (1 + SNR.sqrt()) ** 2 / (math.pi * (1 + SNR)),
}


@pytest.mark.parametrize("case", PUBLISHED, ids="-".join)
def test_weights_are_the_published_ones(case):
    name, prediction, process = case
    torch.testing.assert_close(weightings.WEIGHTINGS[name](LEVELS, prediction, process), PUBLISHED[case])


@pytest.mark.parametrize("name", ON_X0)
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_weighting_means_the_same_for_every_prediction(name, prediction, process):
    """The weighted error of any prediction is the weighted error of the x0 that it implies."""
    x0, eps, error = torch.randn(3, 9, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = noise.add_noise(process, x0, eps, LEVELS)
    target = predictions.target(prediction, process, x0, eps, LEVELS)
    implied, _ = predictions.to_x0_eps(prediction, target + error, process, x_t, LEVELS)
    own = weightings.WEIGHTINGS[name](LEVELS, prediction, process) * error.square().flatten(1).mean(1)
    of_x0 = weightings.WEIGHTINGS[name](LEVELS, "x0", process) * (implied - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(own, of_x0)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("process", PROCESSES)
def test_none_is_one_everywhere(prediction, process):
    assert torch.equal(weightings.WEIGHTINGS["none"](LEVELS.float(), prediction, process), torch.ones(9))
    weightings.check_weighting("none", prediction, process)


@pytest.mark.parametrize("name", weightings.WEIGHTINGS)
def test_weights_are_positive_float32_and_one_a_sample(name):
    weights = weightings.WEIGHTINGS[name](torch.tensor([-6.0, 0.0, 3.0]).bfloat16(), "flow", "flow")
    assert weights.shape == (3,) and weights.dtype == torch.float32 and (weights > 0).all()
    weightings.check_weighting(name, "flow", "flow")


@pytest.mark.parametrize(("name", "prediction", "process"), [("sigma", "eps", "vp"), ("cosmap", "v", "vp")])
def test_flow_weightings_are_refused_elsewhere(name, prediction, process):
    with pytest.raises(ValueError, match=f"'{name}'.*'{prediction}'"):
        weightings.check_weighting(name, prediction, process)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_weighting_without_effect_is_refused(process):
    with pytest.raises(ValueError, match="no effect"):
        weightings.check_weighting("x0", "x0", process)


def test_unknown_weighting_is_named():
    with pytest.raises(ValueError, match=r"'min-snr'.*min-snr-5"):
        weightings.check_weighting("min-snr", "eps", "vp")
