"""The SD3 host against diffusers' own pipeline and scheduler."""

import pytest
import torch

from stylewright.training.hosts.loading import load_host
from stylewright.training.noise import add_noise, log_snr_of_time
from stylewright.training.predictions import target


@pytest.fixture(scope="module")
def host(tiny_folder):
    return load_host(tiny_folder("sd3"))


def test_it_calls_the_transformer_as_the_pipeline_does(host, pipeline_calls):
    calls = pipeline_calls("sd3", "a cat", height=32, width=40, guidance_scale=1.0)
    conditioning = host.encode_prompts(["a cat"])
    assert [call.arguments["timestep"].item() > 999 for call in calls] == [True, False]
    for call in calls:
        log_snr = log_snr_of_time(call.arguments["timestep"] / 1000)
        prediction = host.denoiser(call.arguments["hidden_states"], log_snr, conditioning)
        torch.testing.assert_close(prediction, call.output, rtol=1e-4, atol=1e-5)


def test_noise_and_prediction_are_the_schedulers(host, tiny_folder):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_folder("sd3"), subfolder="scheduler")
    scheduler.set_timesteps(4)
    x0, eps = torch.randn(3, 4, 6, 10), torch.randn(3, 4, 6, 10)
    log_snr = log_snr_of_time(scheduler.sigmas[1:4])
    x_t = add_noise(host.denoiser.process, x0, eps, log_snr)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x0, scheduler.timesteps[1:4], eps))
    flow = target(host.denoiser.prediction, host.denoiser.process, x0, eps, log_snr)
    last = scheduler.step(flow[2], scheduler.timesteps[3], x_t[2]).prev_sample
    torch.testing.assert_close(last, x0[2], rtol=1e-4, atol=1e-5)


def test_its_schedule_has_the_models_shift(host):
    time = torch.sigmoid(-host.schedule(4, 4096) / 2)
    torch.testing.assert_close(time[2], torch.tensor(0.75))  # 3 t / (1 + 2 t) at t = 1/2
    assert time[[0, -1]].tolist() == [1.0, 0.0]


def test_sizes_come_from_the_model(host):
    assert (host.resolution, host.pixels_per_latent, host.pixels_per_token, host.latent_channels) == (32, 2, 4, 4)


def test_it_opens_without_t5(tiny_folder, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_folder("sd3"), text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "small")
    context = load_host(tmp_path / "small").encode_prompts(["a cat"])["context"]
    assert context.shape == (1, 77 + 256, 32)
    assert not context[:, 77:].any()
