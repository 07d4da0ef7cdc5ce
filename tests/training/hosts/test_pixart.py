"""The PixArt host against diffusers' own pipelines and scheduler."""

import pytest
import torch

from stylewright.training.hosts.loading import load_host
from stylewright.training.hosts.pixart import pixart_to_diffusers
from stylewright.training.noise import add_noise
from stylewright.training.predictions import target, to_x0_eps

FAMILIES = ["pixart", "pixart_sigma"]


@pytest.fixture(scope="module")
def hosts(tiny_folder):
    return {family: load_host(tiny_folder(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_calls_the_transformer_as_the_pipeline_does(hosts, pipeline_calls, family):
    host = hosts[family]
    size = {"height": 32, "width": 40, "use_resolution_binning": False}
    calls = pipeline_calls(family, "a cat", guidance_scale=1.0, **size)
    conditioning = host.encode_prompts(["a cat"])
    assert conditioning["mask"].sum() < conditioning["mask"].numel()
    for call in calls:
        log_snr = host.denoiser.clock.log_snr_of(call.arguments["timestep"].float())
        prediction = host.denoiser(call.arguments["hidden_states"], log_snr, conditioning)
        torch.testing.assert_close(prediction, call.output[:, :4], rtol=1e-4, atol=1e-5)


def test_noise_and_prediction_are_the_schedulers(hosts):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    denoiser, indices = hosts["pixart"].denoiser, torch.tensor([3, 400, 999])
    x0, eps = torch.randn(3, 4, 6, 10), torch.randn(3, 4, 6, 10)
    log_snr = denoiser.clock.log_snr_of(indices)
    x_t = add_noise(denoiser.process, x0, eps, log_snr)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, eps, indices), rtol=1e-4, atol=1e-5)
    prediction = target(denoiser.prediction, denoiser.process, x0, eps, log_snr)
    assert torch.equal(prediction, eps)
    data, _ = to_x0_eps(denoiser.prediction, prediction, denoiser.process, x_t, log_snr)
    torch.testing.assert_close(data, x0, rtol=1e-3, atol=1e-3)  # 1 / alpha is 157 at the last index


def test_the_range_is_the_linear_tables(hosts):
    assert hosts["pixart"].denoiser.log_snr_range == pytest.approx((-10.12, 9.21), abs=0.01)


def test_padding_does_not_matter(hosts):
    host, x_t, log_snr = hosts["pixart"], torch.randn(1, 4, 6, 10), torch.tensor([-4.0])
    conditioning = host.encode_prompts(["a cat"])
    padded = conditioning["mask"][:, :, None] == 0
    changed = conditioning | {"context": conditioning["context"].masked_fill(padded, 7.0)}
    prediction = host.denoiser(x_t, log_snr, conditioning)
    torch.testing.assert_close(host.denoiser(x_t, log_snr, changed), prediction)
    unmasked = changed | {"mask": torch.ones_like(changed["mask"])}
    assert not torch.allclose(host.denoiser(x_t, log_snr, unmasked), prediction)


def test_the_size_of_the_picture_is_told_where_the_model_asks(hosts):
    shapes = hosts["pixart"].denoiser._size(torch.zeros(3, 4, 6, 10))
    assert shapes["resolution"].tolist() == [[12.0, 20.0]] * 3
    torch.testing.assert_close(shapes["aspect_ratio"], torch.full((3, 1), 0.6))
    assert hosts["pixart_sigma"].denoiser._size(torch.zeros(3, 4, 6, 10))["resolution"] is None
    assert (hosts["pixart"].told_sizes, hosts["pixart_sigma"].told_sizes) == (True, False)


def test_the_sizes_are_the_originals_and_the_ratio_that_of_what_is_kept(hosts):
    """As in PixArt-alpha's own training data."""
    told = hosts["pixart"].denoiser._size(torch.zeros(1, 4, 6, 10), torch.tensor([[50, 70, 1, 0, 48, 80]]))
    assert told["resolution"].tolist() == [[50.0, 70.0]] and told["aspect_ratio"].tolist() == [[pytest.approx(0.6)]]


def test_foreign_keys_are_refused():
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.sr\.weight is not a key of PixArt"):
        pixart_to_diffusers({"blocks.0.attn.sr.weight": torch.zeros(3)})
