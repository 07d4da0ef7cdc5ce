"""The score of distillation, and where it leads: to the teacher's distribution, whose scores are known exactly."""

import math

import pytest
import torch

from stylewright.training.clocks import DiscreteClock, FlowClock, linear_alphas, log_snr_at, scaled_linear_alphas
from stylewright.training.distillation import (
    annealed,
    clamped_similarity_loss,
    dmd_gradient,
    fake_weight,
    guidance_scales,
    guided,
    student_loss,
    vsd_gradient,
)
from stylewright.training.noise import add_noise, log_snr_of_time, time_of_log_snr
from stylewright.training.one_step import x0_of
from stylewright.training.predictions import convert

from .gaussian import GaussianMixture

SHAPE = (3, 2, 4, 5)
KINDS = [("flow", "flow"), ("eps", "vp"), ("v", "vp")]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------------------------------------------------------
# Guidance


def test_guidance_of_0_and_1_is_null_and_prompt_exactly_and_half_lies_between():
    null, conditional = draw(*SHAPE), draw(*SHAPE, seed=1)
    made = guided(null, conditional, torch.tensor([0.0, 1.0, 0.5]))
    assert torch.equal(made[0], null[0]) and torch.equal(made[1], conditional[1])
    torch.testing.assert_close(made[2], (null[2] + conditional[2]) / 2)


def test_swiftbrush_v2s_gamma_is_this_scale_less_1():
    null, conditional, gamma = draw(*SHAPE), draw(*SHAPE, seed=1), 3.5
    made = guided(null, conditional, torch.full((3,), gamma + 1, dtype=torch.float64))
    torch.testing.assert_close(made, conditional + gamma * (conditional - null))


def test_scales_are_uniform_from_low_to_high_and_fixed_where_both_are_one():
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    scales = guidance_scales(0.5, 4.0, u)
    assert 0.5 <= scales.min() < 0.501 and 3.999 < scales.max() <= 4.0
    assert scales.mean().item() == pytest.approx(2.25, abs=0.01)
    assert scales.std().item() == pytest.approx(3.5 / math.sqrt(12), abs=0.01)
    assert set(guidance_scales(4.5, 4.5, u[:10]).tolist()) == {4.5}


# --------------------------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize(("prediction", "process"), KINDS)
def test_the_gradient_is_sigma_squared_times_the_difference_of_predictions(prediction, process):
    x_t, real, fake = (draw(*SHAPE, seed=seed) for seed in range(3))
    log_snr = torch.tensor([-3.0, 0.5, 2.0], dtype=torch.float64)
    said = [convert(x0, "x0", prediction, process, x_t, log_snr) for x0 in (real, fake)]
    sigma = time_of_log_snr(log_snr) if process == "flow" else torch.sigmoid(-log_snr).sqrt()
    expected = sigma.reshape(-1, 1, 1, 1) ** 2 * (said[0] - said[1])
    torch.testing.assert_close(vsd_gradient(real, fake, prediction, process, log_snr), expected)


def test_the_forms_by_noise_and_by_velocity_of_a_flow_differ_by_alpha_alone():
    real, fake = draw(*SHAPE), draw(*SHAPE, seed=1)
    time = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    log_snr = log_snr_of_time(time)
    by_noise, by_flow = (vsd_gradient(real, fake, kind, "flow", log_snr) for kind in ("eps", "flow"))
    torch.testing.assert_close(by_noise, (1 - time).reshape(-1, 1, 1, 1) * by_flow)
    torch.testing.assert_close(by_flow, time.reshape(-1, 1, 1, 1) * (fake - real))


def test_dmds_gradient_has_the_sign_of_the_other_and_the_size_of_one_per_mean_distance():
    x0, real, fake = (draw(*SHAPE, seed=seed) for seed in range(3))
    made = dmd_gradient(x0, real, fake)
    other = vsd_gradient(real, fake, "eps", "vp", torch.zeros(3, dtype=torch.float64))
    assert torch.equal(made.sign(), other.sign())
    torch.testing.assert_close(made[1], (fake[1] - real[1]) / (x0[1] - real[1]).abs().mean())


def test_what_is_not_finite_counts_nothing():
    real, fake = draw(*SHAPE), draw(*SHAPE, seed=1)
    real[0, 0, 0, 0], fake[1, 0, 0, 0] = math.inf, math.nan
    for made in (
        vsd_gradient(real, fake, "flow", "flow", torch.zeros(3)),
        dmd_gradient(draw(*SHAPE, seed=2), real, fake),
    ):
        assert made.isfinite().all()
        assert made[2].abs().min() > 0


def test_the_students_loss_has_the_gradient_g_over_the_number_of_elements():
    x0, g = draw(*SHAPE).requires_grad_(), draw(*SHAPE, seed=1).requires_grad_()
    losses = student_loss(x0, g)
    assert losses.shape == (3,)
    losses.mean().backward()
    torch.testing.assert_close(x0.grad, g.detach() / g.numel())
    assert g.grad is None


def test_the_fakes_loss_counts_noise_by_alpha_squared_and_v_and_flow_fully():
    log_snr = torch.tensor([-3.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(fake_weight("eps", "vp", log_snr), torch.sigmoid(log_snr))
    for prediction, process in (("v", "vp"), ("flow", "flow")):
        torch.testing.assert_close(fake_weight(prediction, process, log_snr), torch.ones_like(log_snr))


@pytest.mark.parametrize(("alphas", "gain"), [(scaled_linear_alphas(), 14.65), (linear_alphas(), 157.4)])
def test_float32_recovers_the_data_at_the_last_time_and_bfloat16_does_not(alphas, gain):
    clock = DiscreteClock(alphas)
    log_snr = log_snr_at(clock, torch.ones(3))
    x0, eps = draw(*SHAPE, dtype=torch.float32), draw(*SHAPE, seed=1, dtype=torch.float32)
    x_t = add_noise("vp", x0, eps, log_snr)
    assert 1 / torch.sigmoid(log_snr[0]).sqrt().item() == pytest.approx(gain, abs=0.05)
    torch.testing.assert_close(x0_of("eps", eps, "vp", x_t, log_snr), x0, atol=2e-4, rtol=0)
    assert (x0_of("eps", eps.bfloat16(), "vp", x_t, log_snr) - x0).abs().max() > 0.04


def test_a_share_of_the_way_to_noise_is_a_models_own_time():
    assert FlowClock(1000.0).time_of(log_snr_at(FlowClock(1000.0), torch.tensor([0.4]))).item() == pytest.approx(400)
    assert log_snr_at(FlowClock(), torch.tensor([1.0])).item() == -math.inf
    clock = DiscreteClock(scaled_linear_alphas())
    assert clock.time_of(log_snr_at(clock, torch.tensor([1.0, 0.0]))).tolist() == [999.0, 0.0]


# --------------------------------------------------------------------------------------------------------------------
# The text's part


def test_what_is_similar_enough_costs_nothing_and_is_not_moved():
    pictures = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).requires_grad_()
    losses = clamped_similarity_loss(pictures, torch.tensor([[1.0, 1.0], [1.0, 0.1]]), tau=0.37)
    losses.sum().backward()
    assert losses[0] == 0 and losses[1].item() == pytest.approx(0.37 - 0.1 / math.sqrt(1.01))
    assert not pictures.grad[0].any() and pictures.grad[1].any()


def test_its_weight_falls_on_a_line_to_nothing():
    assert [annealed(0.1, step, 4) for step in range(5)] == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])


# --------------------------------------------------------------------------------------------------------------------
# Where it leads. Two prompts mean N(-1, 0.5^2) and N(1, 0.5^2), and no prompt the one or the other. The student of a
# prompt is x0 = spread z + place, so that its own scores are known exactly, too.

PLACES, SPREAD = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), 0.5
ROWS = 512


def mixture(places, spreads, process, weights=(0.5, 0.5)):
    return GaussianMixture(places, spreads, torch.tensor(weights), process)


def led(gradient_of, process, *, steps=250, rate=0.05, seed=0):
    """Places and spreads (2,) of the students whose x0, prompts (b,) and x_t give a gradient."""
    places = torch.tensor([0.3, -0.1]).reshape(2, 1, 1, 1).requires_grad_()
    spreads = torch.tensor([1.2, 0.9]).requires_grad_()
    optimizer = torch.optim.Adam([places, spreads], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    source = torch.Generator().manual_seed(seed)
    prompts = torch.arange(ROWS) % 2
    for _ in range(steps):
        z, eps = (torch.randn((ROWS, 1, 1, 1), generator=source) for _ in range(2))
        x0 = spreads[prompts].reshape(-1, 1, 1, 1) * z + places[prompts]
        fakes = places.detach(), spreads.detach()
        g = gradient_of(x0.detach(), eps, prompts, fakes, torch.rand(2, generator=source))
        student_loss(x0, g).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return places.detach().flatten(), spreads.detach().abs()


def both_answers(x_t, log_snr, prompts, places, spreads, process):
    """What the ideal denoiser of N(places, spreads^2) says without a prompt, and for each row's."""
    null = mixture(places, spreads, process).x0(x_t, log_snr)
    alone = torch.stack(
        [mixture(places[k : k + 1], spreads[k : k + 1], process, (1.0,)).x0(x_t, log_snr) for k in range(2)]
    )
    return null, alone[prompts, torch.arange(len(x_t))]


def pg_sb(prediction, process, low, high):
    def gradient_of(x0, eps, prompts, fakes, u):
        log_snr = log_snr_of_time(0.02 + 0.96 * u[:1]).expand(ROWS)
        scales = guidance_scales(low, high, u[1:]).expand(ROWS)
        x_t = add_noise(process, x0, eps, log_snr)
        real = guided(*both_answers(x_t, log_snr, prompts, PLACES, torch.full((2,), SPREAD), process), scales)
        fake = guided(*both_answers(x_t, log_snr, prompts, *fakes, process), scales)
        return vsd_gradient(real, fake, prediction, process, log_snr)

    return gradient_of


@pytest.mark.parametrize(("prediction", "process"), KINDS[:2])
@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.5, 4.0), (4.5, 4.5)])
def test_the_student_becomes_the_teachers_distribution_whatever_the_common_scale(prediction, process, low, high):
    places, spreads = led(pg_sb(prediction, process, low, high), process)
    torch.testing.assert_close(places, PLACES.flatten(), atol=0.06, rtol=0)
    torch.testing.assert_close(spreads, torch.full((2,), SPREAD), atol=0.06, rtol=0)


def test_at_the_teachers_distribution_nothing_pulls_at_any_scale_and_different_scales_do():
    x0, eps, prompts = draw(ROWS, 1, 1, 1), draw(ROWS, 1, 1, 1, seed=1), torch.arange(ROWS) % 2
    fakes = (PLACES, torch.full((2,), SPREAD))
    for u in torch.rand((5, 2), generator=torch.Generator().manual_seed(2)):
        assert not pg_sb("flow", "flow", 0.5, 4.0)(x0, eps, prompts, fakes, u).any()
    log_snr = torch.zeros(ROWS)
    null, alone = both_answers(add_noise("flow", x0, eps, log_snr), log_snr, prompts, *fakes, "flow")
    assert (guided(null, alone, torch.full((ROWS,), 4.0)) - guided(null, alone, torch.ones(ROWS))).abs().max() > 0.1


def test_dmds_student_becomes_what_guidance_makes_of_the_teacher():
    """At one noise level, where null is N(0, 1): a product of powers of two Gaussians, which is one."""
    scale, log_snr, process = 2.0, 1.0, "vp"
    alpha, sigma = torch.sigmoid(torch.tensor(log_snr)).sqrt(), torch.sigmoid(torch.tensor(-log_snr)).sqrt()
    of_prompt, of_null = alpha**2 * SPREAD**2 + sigma**2, alpha**2 + sigma**2
    precision = scale / of_prompt - (scale - 1) / of_null
    place = scale / of_prompt / precision
    spread = ((1 / precision - sigma**2) / alpha**2).sqrt()

    def gradient_of(x0, eps, prompts, fakes, u):
        levels = torch.full((ROWS,), log_snr)
        x_t = add_noise(process, x0, eps, levels)
        null = GaussianMixture(torch.zeros(1, 1, 1, 1), torch.ones(1), torch.ones(1), process).x0(x_t, levels)
        alone = both_answers(x_t, levels, prompts, PLACES, torch.full((2,), SPREAD), process)[1]
        real = guided(null, alone, torch.full((ROWS,), scale))
        return dmd_gradient(x0, real, both_answers(x_t, levels, prompts, *fakes, process)[1])

    places, spreads = led(gradient_of, process)
    assert place > 1.2 and spread < 0.45  # farther apart, and narrower than the teacher unguided
    torch.testing.assert_close(places, torch.stack([-place, place]), atol=0.06, rtol=0)
    torch.testing.assert_close(spreads, spread.expand(2), atol=0.06, rtol=0)
