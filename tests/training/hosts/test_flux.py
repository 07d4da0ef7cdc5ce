"""The FLUX host against diffusers' own pipeline and scheduler."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stylewright.training.hosts.flux import FluxDenoiser, image_ids, pack, unpack
from stylewright.training.hosts.generate import with_extras
from stylewright.training.hosts.loading import load_host
from stylewright.training.noise import add_noise, log_snr_of_time
from stylewright.training.predictions import target

INFINITE = float("inf")


@pytest.fixture(scope="module")
def host(tiny_folder):
    return load_host(tiny_folder("flux"))


def test_it_calls_the_transformer_as_the_pipeline_does(host, pipeline_calls):
    first, second = pipeline_calls("flux", "a cat", height=32, width=48, guidance_scale=3.5)
    conditioning = with_extras(host.encode_prompts(["a cat"]), host.sampling_conditioning)
    assert first.arguments["timestep"] == 1.0
    assert 0.1 < second.arguments["timestep"] < 0.9
    for call in (first, second):
        x_t = unpack(call.arguments["hidden_states"], 32 // host.pixels_per_token)
        prediction = host.denoiser(x_t, log_snr_of_time(call.arguments["timestep"]), conditioning)
        torch.testing.assert_close(prediction, unpack(call.output, 8), rtol=1e-4, atol=1e-5)


def test_packing_is_the_pipelines():
    from diffusers import FluxPipeline

    latents = torch.randn(3, 4, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 3, 4, 6, 10))
    assert torch.equal(unpack(pack(latents), 3), latents)
    ids = FluxPipeline._prepare_latent_image_ids(3, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(3, 5, torch.device("cpu")), ids)


def test_noise_and_prediction_are_the_schedulers(host):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x0, eps = torch.randn(3, 16, 6, 10), torch.randn(3, 16, 6, 10)
    log_snr = log_snr_of_time(scheduler.sigmas[1:4])
    x_t = add_noise(host.denoiser.process, x0, eps, log_snr)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x0, scheduler.timesteps[1:4], eps))
    flow = target(host.denoiser.prediction, host.denoiser.process, x0, eps, log_snr)
    last = scheduler.step(flow[2], scheduler.timesteps[3], x_t[2]).prev_sample  # the last step ends at data
    torch.testing.assert_close(last, x0[2], rtol=1e-4, atol=1e-5)


def test_its_schedule_is_the_pipelines(host, tiny_folder):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_folder("flux"), subfolder="scheduler")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 5, 5).tolist(), mu=0.5 + 0.65 * (1024 - 256) / 3840)
    torch.testing.assert_close(torch.sigmoid(-host.schedule(5, 1024) / 2), scheduler.sigmas)
    assert host.schedule(5, 1024).diff().min() > 0
    even = load_host(tiny_folder("schnell")).schedule(4, 1024)
    torch.testing.assert_close(torch.sigmoid(-even / 2), torch.linspace(1, 0, 5))


def test_guidance_is_one_in_training_and_none_without_distillation(host, tiny_folder):
    assert host.training_conditioning["guidance"].tolist() == [1.0]
    assert host.sampling_conditioning["guidance"].tolist() == [3.5]
    schnell = load_host(tiny_folder("schnell"))
    assert (schnell.training_conditioning, schnell.sampling_conditioning) == ({}, {})
    assert schnell.encode_prompts(["a cat"])["context"].shape == (1, 256, 32)
    assert host.encode_prompts(["a cat"])["context"].shape == (1, 512, 32)
    with pytest.raises(ValueError, match='needs "guidance"'):
        host.denoiser(torch.randn(1, 4, 4, 6), torch.zeros(1), host.encode_prompts(["a cat"]))


def test_odd_latents_are_refused(host):
    conditioning = with_extras(host.encode_prompts(["a cat"]), host.training_conditioning)
    with pytest.raises(ValueError, match=r"even sides, got \(1, 4, 5, 6\)"):
        host.denoiser(torch.randn(1, 4, 5, 6), torch.zeros(1), conditioning)


class Spy(nn.Module):
    """Shows what reaches the embedding of time."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(guidance_embeds=False)
        self.x_embedder = nn.Linear(1, 1, dtype=torch.bfloat16)
        self.time_text_embed = nn.Identity()

    def forward(self, *, hidden_states, timestep, **others):
        self.seen = self.time_text_embed((timestep.to(hidden_states.dtype) * 1000).float())
        return [hidden_states]


@pytest.mark.parametrize("log_snr", [-INFINITE, -12.0, -6.0, 0.0, INFINITE])
def test_time_reaches_the_model_in_float32(log_snr):
    spy = Spy()
    conditioning = {"context": torch.zeros(2, 3, 4), "pooled": torch.zeros(2, 4)}
    FluxDenoiser(spy)(torch.zeros(2, 4, 6, 8), torch.full((2,), log_snr), conditioning)
    time = 1 / (1 + math.exp(log_snr / 2)) if log_snr < INFINITE else 0.0
    torch.testing.assert_close(spy.seen, torch.full((2,), 1000 * time), rtol=1e-6, atol=0)
    assert not spy.time_text_embed._forward_pre_hooks


def test_a_time_of_zero_and_one_give_finite_predictions(host):
    conditioning = with_extras(host.encode_prompts(["a cat", ""]), host.training_conditioning)
    prediction = host.denoiser(torch.randn(2, 4, 6, 8), torch.tensor([-INFINITE, INFINITE]), conditioning)
    assert prediction.isfinite().all()
    assert prediction.dtype == torch.float32
