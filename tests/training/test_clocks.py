import math

import pytest
import torch

from stylewright.training import clocks, noise

SD = clocks.DiscreteClock(clocks.scaled_linear_alphas())
PIXART = clocks.DiscreteClock(clocks.linear_alphas())
ZERO_SNR = clocks.DiscreteClock(clocks.zero_terminal_snr(clocks.scaled_linear_alphas()))
CLOCKS = {
    "flow": clocks.FlowClock(),
    "sd3": clocks.FlowClock(1000.0),
    "sd": SD,
    "pixart": PIXART,
    "zero-snr": ZERO_SNR,
    "edm": clocks.EDMClock(),
    "edm-half": clocks.EDMClock(sigma_data=0.5),
    "hidream-o1": clocks.FlowClock(spread=8.0),
    "cosmos-predict2": clocks.FlowClock(1.0, (-8.76, 12.43), within=(0.002 / 1.002, 80 / 81)),
    "angle": clocks.AngleClock((-12.43, 7.01)),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_time_and_log_snr_are_inverse_and_time_falls_towards_data(name):
    clock = CLOCKS[name]
    low, high = clock.log_snr_range
    log_snrs = torch.linspace(low, high, 501, dtype=torch.float64)
    times = clock.time_of(log_snrs)
    assert (times.diff() < 0).all()
    torch.testing.assert_close(clock.log_snr_of(times), log_snrs, atol=1e-8, rtol=1e-8)
    assert clock.time_of(log_snrs.float()).dtype == clock.log_snr_of(times.bfloat16()).dtype == torch.float32


def test_ranges_of_the_published_tables():
    assert SD.log_snr_range == pytest.approx((-5.364, 7.07), abs=1e-2)
    assert PIXART.log_snr_range == pytest.approx((-10.1, 9.21), abs=2e-2)
    assert clocks.EDMClock().log_snr_range == pytest.approx((-8.76, 12.43), abs=1e-2)
    assert clocks.scaled_linear_alphas()[-1].item() == pytest.approx(0.00466, abs=1e-5)


@pytest.mark.parametrize(("log_snr", "index"), [(-3.0, 771), (-4.0, 876), (-5.0, 968)])
def test_sd_indices_of_known_levels(log_snr, index):
    assert SD.time_of(torch.tensor([log_snr])).item() == pytest.approx(index, abs=1)


def test_discrete_time_is_the_index_and_linear_between():
    indices = torch.tensor([0.0, 1.0, 500.0, 999.0])
    alphas = clocks.scaled_linear_alphas()[indices.long()]
    torch.testing.assert_close(SD.log_snr_of(indices.double()), torch.log(alphas / (1 - alphas)))
    middle = SD.log_snr_of(torch.tensor([500.0, 500.5, 501.0], dtype=torch.float64))
    assert middle[1].item() == pytest.approx((middle[0] + middle[2]).item() / 2)
    assert SD.time_of(torch.tensor([-9.0, 9.0])).tolist() == [999, 0]


def test_zero_terminal_snr_ends_in_noise_and_keeps_its_beginning():
    before = clocks.scaled_linear_alphas()
    after = clocks.zero_terminal_snr(before)
    assert after[-1] == 0 and after[0].item() == pytest.approx(before[0].item())
    assert ZERO_SNR.log_snr_range[0] == clocks.LOWEST_LOG_SNR < ZERO_SNR.table[-2]


def test_edm_time_is_its_noise_conditioning():
    log_snr = torch.tensor([-4.0, 0.0, 5.0])
    sigma = noise.alpha_sigma("ve", log_snr)[1]
    torch.testing.assert_close(clocks.EDMClock().time_of(log_snr), sigma.log() / 4)
    torch.testing.assert_close(CLOCKS["edm-half"].time_of(log_snr), (0.5 * sigma).log() / 4)


def test_the_time_of_louder_noise_is_its_part_in_the_mixture():
    """x = (1 - t) x0 + 8 t eps: a log_snr of 2 log((1 - t) / 8 t)."""
    time = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = 2 * torch.log((1 - time) / (8 * time))
    torch.testing.assert_close(CLOCKS["hidream-o1"].log_snr_of(time), expected)
    assert clocks.log_snr_at(CLOCKS["hidream-o1"], torch.ones(1)).item() == -math.inf


def test_the_angle_is_that_of_noise_to_data():
    time = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = noise.alpha_sigma("vp", CLOCKS["angle"].log_snr_of(time))
    torch.testing.assert_close((alpha, sigma), ((time * math.pi / 2).cos(), (time * math.pi / 2).sin()))


@pytest.mark.parametrize(
    ("name", "sigmas"), [("cosmos-predict2", (0.002, 80)), ("edm-half", (0.004, 160)), ("angle", (0.03, 500))]
)
def test_the_way_from_data_to_noise_is_as_far_as_the_model_goes(name, sigmas):
    """Noise beside data of unit variance."""
    found = clocks.log_snr_at(CLOCKS[name], torch.tensor([0.0, 1.0])).tolist()
    assert found == pytest.approx([-2 * math.log(sigma) for sigma in sigmas], abs=1e-2)


def test_a_table_must_decrease():
    with pytest.raises(ValueError, match="decreasing"):
        clocks.DiscreteClock(clocks.scaled_linear_alphas().flip(0))


def test_flux_shift_by_resolution():
    assert clocks.flux_shift_mu(256) == 0.5 and clocks.flux_shift_mu(4096) == pytest.approx(1.15)
    assert clocks.flux_shift_mu(1024) == pytest.approx(0.63)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (math.exp(clocks.flux_shift_mu(4096)), (-8.892, -7.430, -6.541)),
        (math.exp(clocks.flux_shift_mu(1024)), (-7.85, -6.39, -5.50)),
        (3.0, (-8.79, -7.33, -6.44)),
    ],
)
def test_the_papers_thresholds_are_levels_of_the_inference_schedule(shift, expected):
    """ "3 %" and "10 %" of the prompt-switching figure are steps 1 and 3 of 28."""
    assert clocks.flow_schedule(28, shift)[1:4].tolist() == pytest.approx(expected, abs=6e-3)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_schedules_rise_from_noise_to_data(steps):
    flow, discrete = clocks.flow_schedule(steps, 3.0), clocks.discrete_schedule(SD, steps)
    for schedule in (flow, discrete):
        assert schedule.shape == (steps + 1,) and schedule.dtype == torch.float32
        assert (schedule.diff() > 0).all() and schedule[-1] == math.inf
    assert flow[0] == -math.inf
    assert discrete[0].item() == pytest.approx(SD.log_snr_range[0])


def test_discrete_schedule_is_trailing():
    times = SD.time_of(clocks.discrete_schedule(SD, 4)[:-1].double())
    assert times.tolist() == pytest.approx([999, 749, 499, 249], abs=1e-3)


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="0 sampling steps"):
        clocks.flow_schedule(0)
