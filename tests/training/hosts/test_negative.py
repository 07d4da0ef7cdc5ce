"""Negative prompts inside attention on diffusers models, on tiny ones of each family."""

import pytest
import torch

from stylewright.training.attention_guidance import AttentionGuidance
from stylewright.training.gradients import differentiable
from stylewright.training.hosts.loading import load_host
from stylewright.training.hosts.negative import NegativeDenoiser

FAMILIES = ["schnell", "sd3", "sdxl", "sd15", "pixart"]


@pytest.fixture(params=FAMILIES)
def world(request, tiny_folder):
    host = load_host(tiny_folder(request.param))
    conditions = [host.encode_prompts([text] * 2) for text in ("a cat", "a dog")]
    x_t = torch.randn((2, host.latent_channels, 8, 8), generator=torch.Generator().manual_seed(0))
    return host.denoiser, x_t, torch.tensor([-1.0, 0.5]), *conditions


def test_without_a_scale_it_is_the_denoiser_bit_for_bit(world):
    denoiser, x_t, log_snr, positive, negative = world
    guided = NegativeDenoiser(denoiser, AttentionGuidance("nasa", 0.0), negative)
    assert torch.equal(guided(x_t, log_snr, positive), denoiser(x_t, log_snr, positive))


def test_nag_with_the_same_text_twice_changes_nothing(world):
    denoiser, x_t, log_snr, positive, _ = world
    guided = NegativeDenoiser(denoiser, AttentionGuidance("nag", 4.0), positive)
    torch.testing.assert_close(guided(x_t, log_snr, positive), denoiser(x_t, log_snr, positive), atol=1e-4, rtol=1e-4)


def test_another_text_moves_the_answer_away_and_reaches_gradients(world):
    denoiser, x_t, log_snr, positive, negative = world
    plain = denoiser(x_t, log_snr, positive)
    x_t = x_t.requires_grad_()
    for scale in (0.1, 0.4):
        answer = NegativeDenoiser(denoiser, AttentionGuidance("nasa", scale), negative)(x_t, log_snr, positive)
        assert answer.shape == plain.shape and not torch.allclose(answer, plain, atol=1e-6)
    answer.sum().backward()
    assert x_t.grad.isfinite().all() and x_t.grad.any()


def test_gradients_are_the_same_where_blocks_are_recomputed_after_the_call(world):
    denoiser, x_t, log_snr, positive, negative = world
    found = []
    for checkpoint in (False, True):
        x = x_t.clone().requires_grad_()
        with differentiable(denoiser.module, checkpoint=checkpoint):
            guided = NegativeDenoiser(denoiser, AttentionGuidance("nasa", 0.4), negative)
            guided(x, log_snr, positive).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_texts_of_different_length_and_unknown_families_are_refused(world):
    denoiser, x_t, log_snr, positive, negative = world
    longer = {**negative, "context": negative["context"].repeat(1, 2, 1)}
    with pytest.raises(ValueError, match="expected as many"):
        NegativeDenoiser(denoiser, AttentionGuidance("nasa", 0.2), longer)(x_t, log_snr, positive)
