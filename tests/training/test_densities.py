import math
from itertools import pairwise

import pytest
import torch
from scipy import integrate, stats

from stylewright.training import clocks, noise
from stylewright.training import densities as d
from stylewright.training.density_presets import DENSITIES

U = torch.linspace(0.0005, 0.9995, 1999, dtype=torch.float64)
SD_RANGE = clocks.DiscreteClock(clocks.scaled_linear_alphas()).log_snr_range
EVERY_LAW = {
    **DENSITIES,
    "shifted": d.Shifted(d.Normal(-6, 2), 4.16),
    "truncated": d.Truncated(d.Normal(-6, 2), *SD_RANGE),
    "truncated mixture": d.Truncated(d.Mixture((d.Normal(-6, 1), d.Normal(5.36, 1)), (3, 1)), -7, 6),
    "tabulated": d.Tabulated((-8.0, -6.0, 1.0), (0.0, 0.7, 1.0)),
}


def draws(law, n=1_000_000, seed=0):
    return law.icdf(d.stratified_uniform(n, torch.Generator().manual_seed(seed)))


# ---- what holds for every law


@pytest.mark.parametrize("name", EVERY_LAW)
def test_icdf_inverts_cdf_and_rises_towards_clean(name):
    law = EVERY_LAW[name]
    log_snr = law.icdf(U)
    assert log_snr.dtype == torch.float32 and (log_snr.diff() > 0).all()
    torch.testing.assert_close(law.cdf(log_snr), U, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", EVERY_LAW)
def test_extreme_uniforms_stay_finite(name):
    ends = torch.tensor([0.0, 1e-300, 2.0**-60, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert EVERY_LAW[name].icdf(ends).isfinite().all()
    assert EVERY_LAW[name].icdf(torch.tensor([0.0, 1.0])).isfinite().all()  # float32 rounds to 0 and 1 more readily


@pytest.mark.parametrize("name", EVERY_LAW)
def test_a_law_describes_itself_in_plain_values(name):
    import json

    description = EVERY_LAW[name].describe()
    assert json.loads(json.dumps(description, allow_nan=False)) == description and description["law"]


def test_uniforms_outside_the_unit_interval_are_refused():
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="uniforms"):
            d.Normal(-6, 2).icdf(torch.tensor([0.5, wrong]))


# ---- the paper's law


@pytest.mark.parametrize(("mu", "sigma"), [(-6, 2), (-6, 3), (-2.197, 2), (0, 2)])
def test_normal_is_scipys(mu, sigma):
    u = torch.cat([U, torch.tensor([1e-15, 1e-9, 1 - 1e-9, 1 - 1e-15], dtype=torch.float64)])
    exact = torch.from_numpy(stats.norm(mu, sigma).ppf(u.numpy()))
    torch.testing.assert_close(d.Normal(mu, sigma).icdf(u).double(), exact, atol=1e-6, rtol=1e-6)
    log_snr = torch.linspace(-20, 10, 61, dtype=torch.float64)
    exact = torch.from_numpy(stats.norm(mu, sigma).cdf(log_snr.numpy()))
    torch.testing.assert_close(d.Normal(mu, sigma).cdf(log_snr), exact, atol=0, rtol=1e-10)


# mu, sigma, mean t, median t, t at 5/25/75/95 %, P(t > 0.9), P(log_snr < -6.52), P(log_snr < -8.89), each exact to
# half of its last digit
TABLE = [
    (-6, 2, 0.931, 0.9526, (0.795, 0.911, 0.975, 0.9905), 0.789, 0.397, 0.074),
    (-6, 3, 0.903, 0.9526, (0.630, 0.880, 0.982, 0.9958), 0.704, 0.431, 0.168),
    (-6, 1, 0.947, 0.9526, (0.898, 0.935, 0.966, 0.979), 0.946, 0.302, 0.002),
    (-8, 2, 0.972, 0.982, (0.913, 0.965, 0.991, 0.9965), 0.964, 0.770, 0.328),
    (-4, 2, 0.845, 0.881, (0.588, 0.790, 0.936, 0.975), 0.422, 0.104, 0.007),
    (-2.197, 2, 0.714, 0.750, (0.367, 0.605, 0.855, 0.940), 0.136, 0.015, 0.0004),
    (0, 2, 0.500, 0.500, (0.162, 0.338, 0.663, 0.838), 0.014, 0.001, 0.0),
]


@pytest.mark.parametrize(("mu", "sigma", "mean", "median", "times", "noisy", "style", "first"), TABLE)
def test_a_million_draws_have_the_tabulated_law(mu, sigma, mean, median, times, noisy, style, first):
    law = d.Normal(mu, sigma)
    log_snr = draws(law)
    t = noise.time_of_log_snr(log_snr)
    assert t.mean().item() == pytest.approx(mean, abs=6e-4)
    assert t.median().item() == pytest.approx(median, abs=6e-4)
    shares = torch.tensor([0.05, 0.25, 0.75, 0.95])
    assert torch.quantile(t, shares).tolist() == pytest.approx(times, abs=6e-4)
    assert (t > 0.9).double().mean().item() == pytest.approx(noisy, abs=6e-4)
    for threshold, share in ((-6.52, style), (-8.89, first)):
        assert (log_snr < threshold).double().mean().item() == pytest.approx(share, abs=6e-4)
        assert d.share_below(law, threshold) == pytest.approx(share, abs=6e-4)
    assert d.mean_time(law) == pytest.approx(mean, abs=6e-4)


def test_quantiles_are_named_in_log_snr():
    assert d.quantiles(d.Normal(-6, 2)) == pytest.approx(stats.norm(-6, 2).ppf([0.05, 0.25, 0.5, 0.75, 0.95]), abs=1e-5)


@pytest.mark.parametrize("sigma", [2.0, 3.0])
def test_kohyas_shift_is_the_same_law(sigma):
    """sd-scripts: --timestep_sampling shift --discrete_flow_shift 20.0855 --sigmoid_scale sigma / 2."""
    n = stats.norm.ppf(U.numpy())
    t = 1 / (1 + torch.exp(torch.from_numpy(-sigma / 2 * n)))
    t = 20.0855 * t / (1 + (20.0855 - 1) * t)
    ours = noise.time_of_log_snr(d.Normal(-6, sigma).icdf(1 - U).double())  # their n rises towards noise
    torch.testing.assert_close(ours, t, atol=1e-6, rtol=0)


def test_logit_normal_is_a_shifted_normal_of_logit_time():
    """SD3: logit(t) ~ N(mean, std^2), then shift k; quantiles of t against those formed step by step."""
    t = torch.sigmoid(torch.from_numpy(stats.norm(0.4, 1.3).ppf(U.numpy())))
    t = 3 * t / (1 + 2 * t)
    ours = noise.time_of_log_snr(d.logit_normal(0.4, 1.3, shift=3.0).icdf(1 - U).double())
    torch.testing.assert_close(ours, t, atol=1e-6, rtol=0)
    assert d.logit_normal(3.0, 1.0) == d.Normal(-6, 2) and d.logit_normal(3.0, 1.5) == d.Normal(-6, 3)


# ---- other laws


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15)])
def test_uniform_time_is_uniform_in_flow_time(shift):
    t = shift * U / (1 + (shift - 1) * U)
    ours = noise.time_of_log_snr(d.UniformTime(shift).icdf(1 - U).double())
    torch.testing.assert_close(ours, t, atol=1e-6, rtol=0)


def test_mixture_is_the_weighted_average_of_its_parts():
    law = d.Mixture((d.Normal(-6, 1), d.Normal(4, 0.5)), (3, 1))  # far apart: the quantile jumps between them
    log_snr = draws(law, 400_000)
    assert (log_snr < 0).double().mean().item() == pytest.approx(0.75, abs=1e-4)
    clean = log_snr[log_snr > 0].double().numpy()
    assert stats.kstest(clean, stats.norm(4, 0.5).cdf).statistic < 1e-3
    weighted = 0.75 * stats.norm(-6, 1).cdf(log_snr[:999]) + 0.25 * stats.norm(4, 0.5).cdf(log_snr[:999])
    torch.testing.assert_close(law.cdf(log_snr[:999]), torch.from_numpy(weighted), atol=1e-6, rtol=0)


def test_tabulated_follows_its_points():
    law = d.Tabulated((-8.0, -6.0, 1.0), (0.0, 0.7, 1.0))
    assert law.icdf(torch.tensor([0.35, 0.7, 0.85])).tolist() == pytest.approx([-7, -6, -2.5])
    assert law.cdf(torch.tensor([-99.0, -7.0, 99.0])).tolist() == pytest.approx([0, 0.35, 1])


def test_a_fine_table_of_a_normal_is_that_normal():
    levels = torch.linspace(-20, 8, 4001, dtype=torch.float64)
    shares = torch.from_numpy(stats.norm(-6, 2).cdf(levels.numpy()))
    shares = (shares - shares[0]) / (shares[-1] - shares[0])
    law = d.Tabulated(tuple(levels.tolist()), tuple(shares.tolist()))
    torch.testing.assert_close(law.icdf(U), d.Normal(-6, 2).icdf(U), atol=1e-3, rtol=0)


# ---- truncation


@pytest.mark.parametrize(("mu", "sigma", "outside"), [(-6, 2, 0.6247), (-6, 3, 0.5839), (-4, 2, 0.2476)])
def test_truncation_is_exact_and_piles_nothing_up(mu, sigma, outside):
    whole, (low, high) = d.Normal(mu, sigma), SD_RANGE
    assert d.share_below(whole, low) == pytest.approx(outside, abs=1e-4)
    law = d.Truncated(whole, low, high)
    exact = stats.truncnorm((low - mu) / sigma, (high - mu) / sigma, mu, sigma)
    torch.testing.assert_close(law.icdf(U).double(), torch.from_numpy(exact.ppf(U.numpy())), atol=2e-6, rtol=0)
    log_snr = draws(law, 200_000)
    assert log_snr.min() >= torch.tensor(low) and log_snr.max() <= torch.tensor(high)
    assert stats.kstest(log_snr.double().numpy(), exact.cdf).statistic < 1e-5
    assert (log_snr == log_snr.min()).double().mean() < 2e-5  # a clamp would put the share ``outside`` there


def test_no_index_gets_more_than_its_interval():
    """On SD1.5 the last indices get what the law gives to their levels, and not the mass beyond them."""
    clock = clocks.DiscreteClock(clocks.scaled_linear_alphas())
    law = d.Truncated(d.Normal(-6, 2), *clock.log_snr_range)
    times = clock.time_of(draws(law, 200_000).double())
    edges = clock.log_snr_of(torch.arange(999, 959, -1, dtype=torch.float64))
    for step, (low, high) in enumerate(pairwise(edges.tolist())):
        expected = d.share_below(law, high) - d.share_below(law, low)
        inside = ((times <= 999 - step) & (times > 998 - step)).double().mean().item()
        assert inside == pytest.approx(expected, abs=2e-5)


def test_truncation_of_pixart_loses_two_percent():
    low, _ = clocks.DiscreteClock(clocks.linear_alphas()).log_snr_range
    assert d.share_below(d.Normal(-6, 2), low) == pytest.approx(0.02, abs=2e-3)


def test_a_range_that_the_law_never_reaches_is_an_error():
    with pytest.raises(ValueError, match=r"-40.*\[-5\.36, 7\.07\].*move its mean"):
        d.Truncated(d.Normal(-40, 2), *SD_RANGE)
    with pytest.raises(ValueError, match="low < high"):
        d.Truncated(d.Normal(-6, 2), 3, -3)


# ---- stratification


@pytest.mark.parametrize("n", [1, 2, 4, 7, 4096])
@pytest.mark.parametrize("name", ["style-friendly", "truncated", "style-and-detail"])
def test_exactly_one_draw_in_each_stratum(n, name):
    law = EVERY_LAW[name]
    u = d.stratified_uniform(n, torch.Generator().manual_seed(n))
    assert u.dtype == torch.float64 and ((u > 0) & (u < 1)).all()
    assert torch.equal((u * n).long().sort().values, torch.arange(n))
    if n == 4:  # the same in the law's own quartiles
        quartiles = torch.tensor(d.quantiles(law, (0.25, 0.5, 0.75)))
        assert torch.bincount(torch.searchsorted(quartiles, law.icdf(u)), minlength=4).tolist() == [1, 1, 1, 1]


def test_stratified_draws_have_the_marginal_of_independent_ones():
    """Each position of a batch of 4, over many batches, is uniform: its order in the batch says nothing."""
    draw = torch.Generator().manual_seed(0)
    batches = torch.stack([d.stratified_uniform(4, draw) for _ in range(5000)])
    for position in range(4):
        assert stats.kstest(batches[:, position].numpy(), "uniform").pvalue > 1e-3


def test_stratification_lowers_the_variance_of_a_batch():
    draw = torch.Generator().manual_seed(0)
    law = d.Normal(-6, 2)
    means = torch.stack([law.icdf(d.stratified_uniform(4, draw)).mean() for _ in range(2000)])
    assert means.mean().item() == pytest.approx(-6, abs=0.05)
    assert means.std().item() < 0.5 * 2 / math.sqrt(4)


def test_draws_are_their_generators():
    state = torch.get_rng_state()
    one, two, three = (draws(d.Normal(-6, 2), 64, seed) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three) and torch.equal(torch.get_rng_state(), state)


# ---- precision


def test_no_draw_is_pure_noise_in_float32_and_many_would_be_in_bf16():
    t = noise.time_of_log_snr(draws(d.Normal(-6, 3)))
    assert t.dtype == torch.float32 and t.max() < 1
    assert (t.bfloat16() == 1).double().mean().item() == pytest.approx(0.016, abs=1e-3)


# ---- words and refusals


def test_a_law_is_a_sentence():
    law = d.Truncated(d.Mixture((d.Normal(-6, 2), d.UniformTime()), (0.8, 0.2)), -5.364, 7.069)
    assert d.sentence(law.describe()) == (
        "truncated low=-5.364 high=7.069 of mixture weights=[0.8, 0.2] of (normal mu=-6 sigma=2; uniform-time shift=1)"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: d.Tabulated((-1.0, -2.0), (0.0, 1.0)),
        lambda: d.Tabulated((-2.0, -1.0), (0.1, 1.0)),
        lambda: d.Mixture((d.Normal(0, 1),), (1.0, 2.0)),
        lambda: d.Mixture((d.Normal(0, 1), d.Normal(1, 1)), (1.0, 0.0)),
        lambda: d.UniformTime(-1.0),
    ],
)
def test_laws_that_are_none_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_mean_time_is_the_integral():
    exact, _ = integrate.quad(lambda x: stats.norm(-6, 2).pdf(x) / (1 + math.exp(x / 2)), -30, 20)
    assert d.mean_time(d.Normal(-6, 2)) == pytest.approx(exact, abs=1e-5)
