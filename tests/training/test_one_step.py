import math

import pytest
import torch
from gaussian import ALPHA_SIGMA, GaussianDenoiser

from stylewright.training import clocks, noise, one_step, predictions, sampling

MEAN = torch.tensor([0.7, -1.5]).reshape(2, 1, 1)
STD = torch.tensor([0.5, 1.3]).reshape(2, 1, 1)
SHAPE = (3, 2, 4, 5)
LEVELS = torch.tensor([-4.0, -1.0, 0.5, 3.0])


def draw(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x_t, level, process):
    """E[x0 | x_t] of the Gaussian world, in float64."""
    alpha, sigma = ALPHA_SIGMA[process](torch.tensor(level, dtype=torch.float64))
    mean, std, x_t = MEAN.double(), STD.double(), x_t.double()
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("process", noise.PROCESSES)
@pytest.mark.parametrize("level", [-5.0, 0.3, 4.0])
def test_one_step_is_the_closed_form(level, process, prediction):
    answer = one_step.answer_of(GaussianDenoiser(MEAN, STD, process, prediction), {})
    z = draw()
    first = one_step.first_input(process, z, torch.full((3,), level))
    assert torch.equal(first, z), "unit noise, whatever the level"
    found = one_step.generate(answer, first, z, process=process, log_snrs=torch.tensor([level]))
    torch.testing.assert_close(found.double(), expected(z, level, process), rtol=1e-4, atol=1e-5)


def test_predictions_of_random_networks_are_solved_as_in_float64():
    """Where one over alpha is 157, at the last time of PixArt's table."""
    clock = clocks.DiscreteClock(clocks.linear_alphas())
    (level,) = clock.log_snr_of(torch.tensor([999.0]))
    z, pred = draw(1), draw(2)
    alpha = clocks.linear_alphas()[999].sqrt()
    found = one_step.x0_of("eps", pred, "vp", z, level.expand(3))
    reference = (z.double() - (1 - alpha**2).sqrt() * pred.double()) / alpha
    assert 1 / alpha > 155 and found.dtype == torch.float32
    assert (found - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize(("table", "inverse"), [(clocks.scaled_linear_alphas(), 14.6), (clocks.linear_alphas(), 157.4)])
def test_amplification_is_one_over_alpha_of_what_predicts_noise(table, inverse):
    level = torch.logit(table[-1]).float()
    for prediction, times in {"eps": inverse, "v": 1.0, "x0": 1.0}.items():
        found = float(one_step.amplification(prediction, "vp", level))
        assert found == pytest.approx(times, rel=0.01, abs=0.01)
    assert float(one_step.amplification("flow", "flow", torch.tensor(-math.inf))) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("process", noise.PROCESSES)
def test_without_fresh_noise_it_is_ddim(process):
    denoiser, z = GaussianDenoiser(MEAN, STD, process, "eps"), draw()
    spread = sampling.initial(process, torch.ones(()), LEVELS[0])  # where a sampler begins; a generator at 1
    answer = one_step.answer_of(denoiser, {})
    found = one_step.generate(answer, z * spread, z, process=process, log_snrs=LEVELS, between=one_step.IMPLIED)
    reference = sampling.sample(denoiser, z, {}, log_snrs=torch.cat([LEVELS, torch.tensor([math.inf])]))
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("between", one_step.SHARES)
@pytest.mark.parametrize("process", noise.PROCESSES)
def test_a_few_steps_noise_the_answer_again(process, between):
    z, seen = draw(), []
    answer = one_step.answer_of(GaussianDenoiser(MEAN, STD, process, "v"), {})
    found = one_step.generate(
        answer, z, z, process=process, log_snrs=LEVELS, seed=7, between=between,
        callback=lambda *state: seen.append(state),
    )  # fmt: skip
    x_t = z.double()
    for step, level in enumerate(LEVELS.tolist()):
        x0 = expected(x_t, level, process)
        torch.testing.assert_close(seen[step][1].double(), x_t, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[step][2].double(), x0, rtol=1e-4, atol=1e-4)
        if step < 3:
            (alpha, sigma), (a, s) = (
                ALPHA_SIGMA[process](torch.tensor(each, dtype=torch.float64))
                for each in (level, LEVELS[step + 1].item())
            )
            new = {"fresh": 1.0, "ancestral": 1 - (s * alpha / (a * sigma)) ** 2, "implied": 0.0}[between]
            eps = new**0.5 * one_step.fresh_noise(z, 7, step + 1).double()
            eps = eps + (1 - new) ** 0.5 * (x_t - alpha * x0) / sigma
            x_t = a * x0 + s * eps
    torch.testing.assert_close(found, seen[-1][2])
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]


def test_an_unknown_noise_between_steps():
    z = draw()
    with pytest.raises(ValueError, match="expected one of fresh, ancestral, implied"):
        one_step.generate(lambda x_t, log_snr: x_t, z, z, process="vp", log_snrs=LEVELS, between="loud")


CHAINS = {"LCMScheduler": one_step.FRESH, "EulerAncestralDiscreteScheduler": one_step.ANCESTRAL}
CHAINS |= {"DDIMScheduler": one_step.IMPLIED}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of tables of torch, inside diffusers
@pytest.mark.parametrize("kind", CHAINS)
def test_chains_of_steps_are_those_of_diffusers(kind, monkeypatch):
    """DMD2's and LCM's, the Turbo models', Lightning's and Hyper-SD's, with our fresh noise."""
    import diffusers
    from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm

    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    times, z, ancestral = [999, 749, 499, 249], draw(4), kind.startswith("Euler")

    def network(x_t, time):  # any function of both
        return torch.tanh(x_t * 1.3 + time / 500) + x_t.roll(1, -1) / 3

    if kind == "LCMScheduler":
        scheduler = diffusers.LCMScheduler(**table, clip_sample=False)
        scheduler.set_timesteps(timesteps=times)
    else:
        clip = {} if ancestral else {"clip_sample": False}
        scheduler = getattr(diffusers, kind)(**table, **clip, timestep_spacing="trailing")
        scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == times
    steps = iter((1, 2, 3, 4))
    for module in (scheduling_lcm, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: one_step.fresh_noise(z, 7, next(steps)))
    x_t = z * (scheduler.sigmas[0] ** 2 + 1).sqrt() if ancestral else z
    for time in scheduler.timesteps:
        seen = scheduler.scale_model_input(x_t, time)
        x_t = scheduler.step(network(seen, int(time)), time, x_t).prev_sample

    clock = clocks.DiscreteClock(clocks.scaled_linear_alphas())

    def answer(x_t, log_snr):
        time = round(float(clock.time_of(log_snr)[0]))
        return one_step.x0_of("eps", network(x_t, time), "vp", x_t, log_snr)

    levels = clock.log_snr_of(torch.tensor(times))
    found = one_step.generate(answer, z, z, process="vp", log_snrs=levels, seed=7, between=CHAINS[kind])
    assert (found - x_t).norm() < 1e-5 * x_t.norm()


def test_fresh_noise_belongs_to_its_sample():
    z = draw(3, (4, 16, 32, 32))
    fresh = one_step.fresh_noise(z, 5, 1)
    assert torch.equal(one_step.fresh_noise(z[2:3], 5, 1), fresh[2:3]), "alone as in a batch"
    others = [one_step.fresh_noise(z, 5, 2), one_step.fresh_noise(z, 6, 1), fresh.flip(0), z]
    assert all(abs(float((fresh * other).mean())) < 0.02 for other in others)
    assert float(fresh.mean()) == pytest.approx(0, abs=0.02) and float(fresh.std()) == pytest.approx(1, abs=0.02)


def test_first_inputs():
    z, x0, level = draw(1), draw(2), torch.full((3,), -1.0)
    alpha, sigma = ALPHA_SIGMA["vp"](torch.tensor(-1.0))
    torch.testing.assert_close(one_step.first_input("vp", z, level, x0), alpha * x0 + sigma * z)
    torch.testing.assert_close(one_step.first_input("vp", z, level, start=one_step.SCALED), sigma * z)
    with pytest.raises(ValueError, match="expected unit or scaled"):
        one_step.first_input("vp", z, level, start="loud")


def test_inpainting_keeps_what_is_not_masked_and_shows_it_noised():
    z, given, mask, shown = draw(1), draw(2), torch.zeros(1, 1, 4, 5), []
    mask[..., 2:] = 1

    def answer(x_t, log_snr):
        shown.append(x_t)
        return x_t * 3

    inpaint = one_step.inpainting(answer, "flow", given, z, mask)
    found = one_step.generate(inpaint, z, z, process="flow", log_snrs=torch.tensor([-2.0]))
    alpha, sigma = ALPHA_SIGMA["flow"](torch.tensor(-2.0))
    assert torch.equal(found[..., :2], given[..., :2])
    torch.testing.assert_close(shown[0][..., :2], (alpha * given + sigma * z)[..., :2])
    torch.testing.assert_close(found[..., 2:], 3 * z[..., 2:])


@pytest.mark.parametrize("levels", [[0.0, 0.0], [1.0, -1.0], [math.inf], [math.nan], []])
def test_levels_must_increase_from_noise(levels):
    z = draw()
    with pytest.raises(ValueError, match="Got noise levels"):
        one_step.generate(lambda x_t, log_snr: x_t, z, z, process="vp", log_snrs=torch.tensor(levels))
