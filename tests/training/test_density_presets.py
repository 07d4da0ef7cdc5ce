import math

import pytest
import torch

from stylewright.training import clocks, noise
from stylewright.training import densities as d
from stylewright.training.density_presets import DENSITIES, DensityConfig, build_density, preset_density

U = torch.linspace(0.0005, 0.9995, 1999, dtype=torch.float64)
SD_RANGE = clocks.DiscreteClock(clocks.scaled_linear_alphas()).log_snr_range


def test_presets_are_the_papers():
    assert DENSITIES["style-friendly-flux"] == d.Normal(-6, 3)
    assert DENSITIES["style-friendly-sd3.5"] == DENSITIES["style-friendly"] == d.Normal(-6, 2)
    assert DENSITIES["objects"] == d.Normal(-2.2, 2)
    assert DENSITIES["sd3"].mu == pytest.approx(-2 * math.log(3)) and DENSITIES["sd3"].sigma == 2


@pytest.mark.parametrize(
    ("preset", "mean", "shares"),
    [
        ("schedule-sd", -0.97, (0.65, 0.35, 0.12, 0, 0)),
        ("schedule-sd3", -2.20, (0.75, 0.53, 0.29, 0.13, 0.05)),
        ("schedule-flux", -2.30, (0.76, 0.54, 0.30, 0.14, 0.06)),
        ("style-friendly", -6, (0.999, 0.98, 0.84, 0.50, 0.16)),
    ],
)
def test_schedule_percent_is_the_law_measured_on_comfyuis_trainer(preset, mean, shares):
    law = DENSITIES[preset]
    assert law.icdf(d.stratified_uniform(100_000, torch.Generator().manual_seed(0))).mean().item() == pytest.approx(
        mean, abs=0.02
    )
    below = [d.share_below(law, threshold) for threshold in (0, -2, -4, -6, -8)]
    assert below == pytest.approx(shares, abs=6e-3)


def test_build_truncates_to_the_model():
    law = build_density(DensityConfig(), SD_RANGE, tokens=4096)
    assert law == d.Truncated(d.Normal(-6, 2), *SD_RANGE)


def test_build_bounds_an_unbounded_model():
    law = build_density(DensityConfig("style-friendly-flux"), (-math.inf, math.inf), tokens=4096)
    torch.testing.assert_close(law.icdf(U), d.Normal(-6, 3).icdf(U), atol=4e-2, rtol=0)
    t = noise.time_of_log_snr(law.icdf(torch.tensor([0.0, 1.0])))
    assert t.tolist() == pytest.approx([1 - 1e-4, 1e-4], abs=2e-5)


@pytest.mark.parametrize(("tokens", "median"), [(4096, -6), (64, -1.84), (1024, -4.61)])
def test_resolution_rule_is_off_until_a_reference_is_given(tokens, median):
    on, off = DensityConfig(reference_tokens=4096), DensityConfig()
    assert d.quantiles(build_density(on, clocks.FLOW_RANGE, tokens), (0.5,)) == pytest.approx([median], abs=6e-3)
    assert d.quantiles(build_density(off, clocks.FLOW_RANGE, tokens), (0.5,)) == pytest.approx([-6], abs=1e-3)


def test_a_model_states_the_reference_where_the_user_does_not():
    assert DensityConfig(mu=-3.0).stated_for(4096) == DensityConfig(mu=-3.0, reference_tokens=4096)
    assert DensityConfig(reference_tokens=1024).stated_for(4096).reference_tokens == 1024
    assert DensityConfig().stated_for(None) == DensityConfig()


def test_a_further_shift_moves_the_law_towards_noise():
    law = build_density(DensityConfig(shift=3.0), clocks.FLOW_RANGE, tokens=4096)
    assert d.quantiles(law, (0.5,)) == pytest.approx([-8.197], abs=1e-3)


def test_mean_and_deviation_replace_the_presets():
    law = preset_density(DensityConfig("style-friendly-flux", mu=-4.5))
    assert law == d.Normal(-4.5, 3)
    assert preset_density(DensityConfig("sd3", sigma=1.0)).mu == pytest.approx(-2.197, abs=1e-3)
    assert preset_density(DensityConfig(mu=0.0)) == d.Normal(0, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DensityConfig("style-freindly"), "'style-freindly'.*style-friendly-flux"),
        (DensityConfig("uniform", mu=-6.0), "'uniform' has no mu.*objects"),
        (DensityConfig(sigma=0.0), "sigma=0.0"),
        (DensityConfig(mu=math.nan), "mu=nan"),
        (DensityConfig(shift=0.0), "shift of 0.0"),
        (DensityConfig(reference_tokens=0), "reference of 0"),
    ],
)
def test_bad_configurations_say_what_is_allowed(config, message):
    with pytest.raises(ValueError, match=message):
        build_density(config, clocks.FLOW_RANGE, tokens=64)
