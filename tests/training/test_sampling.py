import math

import pytest
import torch
from gaussian import GaussianDenoiser

from stylewright.training import clocks, noise, predictions, sampling

MEAN = torch.tensor([0.7, -1.5]).reshape(2, 1, 1)
STD = torch.tensor([0.5, 1.3]).reshape(2, 1, 1)
SHAPE = (3, 2, 4, 5)


def schedule(process, steps):
    """From pure noise (flow) or close to it to data."""
    if process == "flow":
        return clocks.flow_schedule(steps, shift=3.0)
    return torch.cat([torch.linspace(-16, 10, steps), torch.tensor([math.inf])])


def affine(denoiser, log_snrs):
    """What sampling does to noise: for Gaussian data it is x0 = offset + slope * noise, found from two inputs."""
    offset, one = (sampling.sample(denoiser, torch.full(SHAPE, value), {}, log_snrs=log_snrs) for value in (0.0, 1.0))
    return offset, one - offset


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("process", noise.PROCESSES)
def test_sampling_reproduces_mean_and_deviation(process, prediction):
    """The exact flow carries N(0, 1) to N(mean, std^2) by an affine map, so no draws are needed to see both."""
    errors = []
    for steps in (100, 200):
        offset, slope = affine(GaussianDenoiser(MEAN, STD, process, prediction), schedule(process, steps))
        errors.append(max((offset - MEAN).abs().max().item(), (slope - STD).abs().max().item()))
    assert errors[1] < 0.03 and errors[1] < 0.6 * errors[0]  # of first order: twice the steps, half the error


@pytest.mark.parametrize("process", noise.PROCESSES)
def test_every_prediction_of_one_model_gives_the_same_picture(process):
    draw = torch.Generator().manual_seed(0)
    start = noise.gaussian(SHAPE, draw)
    pictures = [
        sampling.sample(GaussianDenoiser(MEAN, STD, process, prediction), start, {}, log_snrs=schedule(process, 12)[1:])
        for prediction in predictions.PREDICTIONS
    ]
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], atol=2e-3, rtol=2e-3)


def test_draws_have_the_datas_law():
    start = noise.gaussian((4000, 2, 4, 5), torch.Generator().manual_seed(0))
    x0 = sampling.sample(GaussianDenoiser(MEAN, STD), start, {}, log_snrs=clocks.flow_schedule(100))
    torch.testing.assert_close(x0.mean((0, 2, 3)), MEAN.flatten(), atol=0.02, rtol=0)
    torch.testing.assert_close(x0.std((0, 2, 3)), STD.flatten(), atol=0.03, rtol=0)


def test_a_stable_diffusion_schedule_begins_where_its_table_does():
    """Its table ends at log_snr -5.36, so the mean that is still visible there is lost, and little else."""
    clock = clocks.DiscreteClock(clocks.scaled_linear_alphas())
    offset, slope = affine(GaussianDenoiser(MEAN, STD, "vp", "eps"), clocks.discrete_schedule(clock, 250))
    torch.testing.assert_close(slope, STD.expand(SHAPE), atol=0.02, rtol=0)
    torch.testing.assert_close(offset, MEAN.expand(SHAPE), atol=0.2, rtol=0)


def test_on_a_flow_the_step_is_eulers():
    denoiser = GaussianDenoiser(MEAN, STD)
    start = noise.gaussian(SHAPE, torch.Generator().manual_seed(0))
    log_snrs = clocks.flow_schedule(7, shift=3.0)
    times = noise.time_of_log_snr(log_snrs)
    x = start
    for now, after, log_snr in zip(times[:-1], times[1:], log_snrs[:-1], strict=True):
        x = x + (after - now) * denoiser(x, log_snr.expand(3), {})
    torch.testing.assert_close(sampling.sample(denoiser, start, {}, log_snrs=log_snrs), x, atol=1e-5, rtol=1e-5)


def test_one_step_from_pure_noise_gives_the_mean():
    picture = sampling.sample(GaussianDenoiser(MEAN, STD), torch.randn(SHAPE), {}, log_snrs=clocks.flow_schedule(1))
    torch.testing.assert_close(picture, MEAN.expand(SHAPE), atol=1e-5, rtol=1e-5)


def test_guidance_is_neutral_at_one_and_extrapolates_beyond():
    denoiser = GaussianDenoiser(MEAN, torch.tensor(0.4))
    start = noise.gaussian(SHAPE, torch.Generator().manual_seed(0))
    here, away = {"mean": MEAN.expand(SHAPE)}, {"mean": torch.zeros(SHAPE)}
    log_snrs = clocks.flow_schedule(60)

    def picture(scale, conditioning=here):
        options = {"null_conditioning": away, "guidance_scale": scale, "log_snrs": log_snrs}
        return sampling.sample(denoiser, start, conditioning, **options)

    assert torch.equal(picture(1.0), sampling.sample(denoiser, start, here, log_snrs=log_snrs))
    torch.testing.assert_close(picture(4.0, away), picture(1.0, away))
    # With equal deviations the trajectory is linear in the mean, and the guided mean is scale * MEAN.
    torch.testing.assert_close(picture(3.0) - picture(1.0), 2 * (picture(1.0) - picture(0.0)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(picture(3.0).mean((0, 2, 3)), 3 * MEAN.flatten(), atol=0.25, rtol=0)


def test_callback_sees_each_steps_estimate():
    seen = []
    denoiser = GaussianDenoiser(MEAN, STD)
    start = noise.gaussian(SHAPE, torch.Generator().manual_seed(0))
    x0 = sampling.sample(
        denoiser,
        start,
        {},
        log_snrs=clocks.flow_schedule(3),
        callback=lambda step, steps, x0: seen.append((step, steps, x0)),
    )
    assert [(step, steps) for step, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    torch.testing.assert_close(seen[0][2], MEAN.expand(SHAPE), atol=1e-5, rtol=1e-5)  # at pure noise: the mean
    assert torch.equal(seen[-1][2], x0)


def test_noise_that_was_given_is_left_alone_and_no_graph_is_kept():
    start = noise.gaussian(SHAPE, torch.Generator().manual_seed(0)).requires_grad_()
    before = start.detach().clone()
    x0 = sampling.sample(GaussianDenoiser(MEAN, STD), start, {}, log_snrs=clocks.flow_schedule(3))
    assert torch.equal(start, before) and not x0.requires_grad


def test_bad_arguments_say_what_is_wrong():
    denoiser, start = GaussianDenoiser(MEAN, STD), torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"guidance scale of 4\.0 without"):
        sampling.sample(denoiser, start, {}, log_snrs=clocks.flow_schedule(3), guidance_scale=4.0)
    for wrong in (clocks.flow_schedule(3).flip(0), torch.tensor([0.0]), torch.tensor([-1.0, math.nan, 1.0])):
        with pytest.raises(ValueError, match="increase"):
            sampling.sample(denoiser, start, {}, log_snrs=wrong)
