import math

import pytest
import torch

from stylewright.training import noise

LEVELS = torch.linspace(-18, 18, 73, dtype=torch.float64)


def test_each_process_keeps_its_identity():
    alpha, sigma = noise.alpha_sigma("flow", LEVELS)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(LEVELS))
    alpha, sigma = noise.alpha_sigma("vp", LEVELS)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(LEVELS))
    alpha, _ = noise.alpha_sigma("ve", LEVELS)
    torch.testing.assert_close(alpha, torch.ones_like(LEVELS))


@pytest.mark.parametrize("process", noise.PROCESSES)
def test_log_snr_is_what_its_name_says(process):
    alpha, sigma = noise.alpha_sigma(process, LEVELS)
    torch.testing.assert_close(torch.log(alpha**2 / sigma**2), LEVELS)
    torch.testing.assert_close(noise.log_snr_of(alpha, sigma), LEVELS)
    torch.testing.assert_close(noise.log_snr_of(7 * alpha, 7 * sigma), LEVELS)
    assert (alpha.diff() >= 0).all() and (sigma.diff() < 0).all()


@pytest.mark.parametrize("process", ["flow", "vp"])
def test_the_ends_are_exact(process):
    alpha, sigma = noise.alpha_sigma(process, torch.tensor([-math.inf, math.inf]))
    assert alpha.tolist() == [0, 1] and sigma.tolist() == [1, 0]


@pytest.mark.parametrize("process", noise.PROCESSES)
def test_add_noise_mixes_each_sample_at_its_own_level(process):
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 5, 6, generator=draw)  # batch 3, channels 4, height 5, width 6
    log_snr = torch.tensor([-6.0, 0.0, 3.0])
    x_t = noise.add_noise(process, x0, eps, log_snr)
    alpha, sigma = noise.alpha_sigma(process, log_snr)
    for i in range(3):
        torch.testing.assert_close(x_t[i], alpha[i].item() * x0[i] + sigma[i].item() * eps[i])


def test_half_precision_is_widened_and_double_stays():
    x0, eps = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    log_snr = torch.tensor([-6.03, 0.01, 3.0])
    assert noise.add_noise("flow", x0, eps, log_snr).dtype == torch.float32
    assert noise.time_of_log_snr(log_snr.bfloat16()).dtype == torch.float32
    assert noise.alpha_sigma("vp", log_snr.half())[0].dtype == torch.float32
    assert noise.alpha_sigma("vp", log_snr.double())[0].dtype == torch.float64


def test_levels_must_be_one_a_sample():
    latents = torch.zeros(3, 4, 5, 6)
    assert noise.expand(torch.ones(3), latents).shape == (3, 1, 1, 1)
    for wrong in (torch.ones(6), torch.ones(1), torch.tensor(1.0), torch.ones(3, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"batch of shape \(3, 4, 5, 6\)"):
            noise.expand(wrong, latents)


def test_unknown_process_is_named():
    with pytest.raises(ValueError, match=r"'edm'.*flow, vp, ve"):
        noise.alpha_sigma("edm", LEVELS)


def test_noise_belongs_to_its_generator():
    global_state = torch.get_rng_state()
    first, again, other = (noise.gaussian((3, 4, 5, 6), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.dtype == torch.float32 and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), global_state)
    large = noise.gaussian((2, 1, 300, 400), torch.Generator().manual_seed(0))
    assert abs(large.mean()) < 0.01 and abs(large.std() - 1) < 0.01


def test_offset_is_constant_over_the_positions_of_each_sample_and_channel():
    shape, offset = (70, 40, 5, 6), 0.1
    plain = noise.gaussian(shape, torch.Generator().manual_seed(3))
    added = noise.gaussian(shape, torch.Generator().manual_seed(3), offset=offset) - plain
    torch.testing.assert_close(added, added[:, :, :1, :1].expand(shape), atol=1e-6, rtol=0)
    constants = added[:, :, 0, 0]
    assert abs(constants.std().item() - offset) < 0.01 and abs(constants.mean().item()) < 0.01
    assert constants.std(0).min() > 0.05 and constants.std(1).min() > 0.05  # differs by sample and by channel


def test_flow_time_is_one_at_noise_and_falls_as_log_snr_rises():
    times = noise.time_of_log_snr(LEVELS)
    assert (times.diff() < 0).all() and noise.time_of_log_snr(torch.tensor([0.0])).item() == 0.5
    torch.testing.assert_close(noise.log_snr_of_time(times), LEVELS)
    torch.testing.assert_close(times, noise.alpha_sigma("flow", LEVELS)[1])
    assert noise.log_snr_of_time(torch.tensor([1.0, 0.0])).tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("shift", [1.0, 3.0, 20.0855, 0.5])
def test_timestep_shift_is_an_addition(shift):
    times = noise.time_of_log_snr(LEVELS)
    shifted = shift * times / (1 + (shift - 1) * times)
    torch.testing.assert_close(noise.time_of_log_snr(noise.shift_log_snr(LEVELS, shift)), shifted)


def test_a_shift_above_one_moves_towards_noise():
    assert noise.timestep_shift(3.0) == pytest.approx(-2.197, abs=1e-3)
    assert noise.shift_log_snr(torch.tensor([-6.0]), 3.0).item() == pytest.approx(-8.197, abs=1e-3)
    for wrong in (0.0, -3.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            noise.timestep_shift(wrong)


def test_resolution_rule_carries_the_mean_to_other_sizes():
    assert noise.resolution_shift(4096, 4096) == 0
    assert -6 + noise.resolution_shift(64, 4096) == pytest.approx(-1.84, abs=2e-3)
    assert noise.resolution_shift(1024, 4096) == pytest.approx(1.39, abs=4e-3)  # 512^2 against 1024^2
    assert noise.resolution_shift(8192, 4096) < 0  # a larger picture needs more noise
    with pytest.raises(ValueError, match="0 tokens"):
        noise.resolution_shift(0, 4096)
