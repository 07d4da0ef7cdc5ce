"""The hosts of SD1.5, SD2 and SDXL against diffusers' own pipelines and schedulers."""

import pytest
import torch

from stylewright.training.data.encoding import encode
from stylewright.training.data.items import items_from_memory
from stylewright.training.denoiser import SIZES
from stylewright.training.hosts.loading import load_host
from stylewright.training.hosts.unet import discrete_clock, prediction_of
from stylewright.training.noise import add_noise
from stylewright.training.predictions import target

FAMILIES = ["sd15", "sd2_v", "sdxl"]


@pytest.fixture(scope="module")
def hosts(tiny_folder):
    return {family: load_host(tiny_folder(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_calls_the_unet_as_the_pipeline_does(hosts, pipeline_calls, family):
    host = hosts[family]
    calls = pipeline_calls(family, "a cat", height=32, width=40, guidance_scale=1.0)
    conditioning = host.encode_prompts(["a cat"])
    assert len(calls) == 2
    for call in calls:
        log_snr = host.denoiser.clock.log_snr_of(call.arguments["timestep"].reshape(1).float())
        prediction = host.denoiser(call.arguments["sample"], log_snr, conditioning)
        torch.testing.assert_close(prediction, call.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_and_prediction_are_the_schedulers(hosts, tiny_folder, family):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(tiny_folder(family), subfolder="scheduler")
    denoiser, indices = hosts[family].denoiser, torch.tensor([7, 500, 990])
    x0, eps = torch.randn(3, 4, 6, 10), torch.randn(3, 4, 6, 10)
    log_snr = denoiser.clock.log_snr_of(indices)
    x_t = add_noise(denoiser.process, x0, eps, log_snr)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, eps, indices), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoiser.clock.time_of(log_snr), indices.float(), rtol=1e-5, atol=1e-3)
    prediction = target(denoiser.prediction, denoiser.process, x0, eps, log_snr)
    scheduler.set_timesteps(1000)
    for i in range(2):
        data = scheduler.step(prediction[i], int(indices[i]), x_t[i]).pred_original_sample
        torch.testing.assert_close(data, x0[i], rtol=1e-3, atol=1e-3)


def test_ranges_and_predictions_come_from_the_scheduler(hosts):
    assert {family: host.denoiser.prediction for family, host in hosts.items()} == {
        "sd15": "eps",
        "sd2_v": "v",
        "sdxl": "eps",
    }
    assert hosts["sdxl"].denoiser.log_snr_range == pytest.approx((-5.364, 7.069), abs=1e-3)
    assert hosts["sd2_v"].denoiser.log_snr_range[0] < -14  # its terminal SNR is zero


def test_sizes_may_be_given(hosts):
    host, x_t, log_snr = hosts["sdxl"], torch.randn(2, 4, 6, 10), torch.tensor([-3.0, 1.0])
    conditioning = host.encode_prompts(["a cat", "a dog"])
    own_size = torch.tensor([[12, 20, 0, 0, 12, 20]]).expand(2, -1)
    free = host.denoiser(x_t, log_snr, conditioning)
    assert torch.equal(free, host.denoiser(x_t, log_snr, conditioning | {SIZES: own_size}))
    assert not torch.equal(free, host.denoiser(x_t, log_snr, conditioning | {SIZES: 50 * own_size}))


def test_the_unet_is_told_what_became_of_each_picture(hosts):
    """From a picture and an enlarged part of it to the time ids of diffusers' own UNet."""
    host, seen = hosts["sdxl"], []
    picture = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))
    items = items_from_memory([picture, picture[:, 8:24, 10:26].contiguous()], ["a cat", "a"])
    dataset = encode(items, host, resolution=32, style_phrase="ink")
    hook = host.denoiser.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    batches = [dataset.batch(0, step, 0, 1) for step in range(2)]
    answers = [host.denoiser(batch.latents, torch.zeros(1), batch.conditioning) for batch in batches]
    hook.remove()
    told = [each["time_ids"][0].tolist() for each in seen]
    assert sorted(told) == [[16, 16, 0, 0, 32, 32], [40, 48, 1, 0, 28, 36]]  # enlarged; resized to 30x36
    without = {name: value for name, value in batches[0].conditioning.items() if name != SIZES}
    assert not torch.equal(answers[0], host.denoiser(batches[0].latents, torch.zeros(1), without))
    assert not hosts["sd15"].told_sizes and not hosts["sd2_v"].told_sizes


def test_time_between_two_indices_is_between_their_predictions(hosts):
    """A UNet's embedding of time is continuous: interpolated indices are legitimate."""
    host, x_t = hosts["sd15"], torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    conditioning, clock = host.encode_prompts(["a cat"]), host.denoiser.clock
    low, middle, high = (
        host.denoiser(x_t, clock.log_snr_of(torch.tensor([index])), conditioning) for index in (500.0, 500.5, 501.0)
    )
    # The fastest wave turns by a radian an index, so half-way it is off its chord by 1 - cos(1/2) = 0.12.
    assert (middle - (low + high) / 2).norm() < 0.3 * (low - high).norm()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler has beta_schedule None"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"beta_schedule": "linear", "trained_betas": [0.1, 0.2]}, "can be made of"),
    ],
)
def test_other_schedulers_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        discrete_clock(config)


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type 'flow_prediction'"):
        prediction_of({"prediction_type": "flow_prediction"})
