"""The bridge's denoiser against ComfyUI's own sampling, family by family."""

import math

import pytest
import torch

pytestmark = pytest.mark.comfy

FAMILIES = ("sd15", "sdxl", "flux", "sd3", "pixart", "qwen")
SIZES = dict.fromkeys(FAMILIES, (16, 24)) | {"pixart": (48, 64)}  # PixArt counts positions from a base size


def x0_of_comfyui(model, clip, prompt, x, sigma):
    """ComfyUI's denoised latent at one sigma, by its own guider and a sampler that makes one call."""
    import comfy.samplers

    answers = []

    def call_once(model_k, noise, sigmas, extra_args=None, callback=None, disable=None):
        answers.append(model_k(x, sigma.expand(len(x)), **extra_args))
        return noise

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(clip.encode_from_tokens_scheduled(prompt), [])
    guider.set_cfg(1.0)
    sigmas = torch.tensor([float(sigma), 0.0])
    guider.sample(
        torch.zeros_like(x), torch.zeros_like(x), comfy.samplers.KSAMPLER(call_once), sigmas, disable_pbar=True
    )
    return answers[0]


def denoiser_of(model, clip):
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable

    prompts = PromptTable(clip)
    return ComfyDenoiser(model, prompts), prompts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("log_snr", [-5.0, -1.0, 3.0])
def test_predictions_are_what_comfyui_samples_with(family, log_snr, tiny, tiny_clip, latent_channels):
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.predictions import to_x0_eps

    model, clip = tiny(family), tiny_clip(family)
    x_t = torch.randn(2, latent_channels[family], *SIZES[family], generator=torch.Generator().manual_seed(3))
    with training_session(model), torch.no_grad():
        denoiser, prompts = denoiser_of(model, clip)
        levels = torch.full((2,), log_snr)
        prediction = denoiser(x_t, levels, prompts.encode(["a red star", "a red star"]))
        x0, _ = to_x0_eps(denoiser.prediction, prediction, denoiser.process, x_t, levels)
        sigma = math.exp(-log_snr / 2) if denoiser.process == "vp" else 1 / (1 + math.exp(log_snr / 2))
        x = x_t * math.sqrt(1 + sigma**2) if denoiser.process == "vp" else x_t
    with torch.inference_mode():
        x = x[:, :, None] if family == "qwen" else x
        expected = x0_of_comfyui(model, clip, "a red star", x, torch.tensor(sigma)).reshape(x_t.shape)
    assert prediction.dtype == torch.float32
    torch.testing.assert_close(x0, expected.clone(), rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_do_not_touch_each_other(family, tiny, tiny_clip, latent_channels):
    from stylewright.nodes.bridge.session import training_session

    model, clip = tiny(family), tiny_clip(family)
    x_t = torch.randn(3, latent_channels[family], *SIZES[family], generator=torch.Generator().manual_seed(4))
    levels = torch.tensor([-4.0, 0.0, 2.0])
    texts = ["one", "two words", "one more prompt of a length of its own"]
    with training_session(model), torch.no_grad():
        denoiser, prompts = denoiser_of(model, clip)
        together = denoiser(x_t, levels, prompts.encode(texts))
        alone = [denoiser(x_t[i : i + 1], levels[i : i + 1], prompts.encode([texts[i]])) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_guidance_reaches_a_distilled_model(tiny, tiny_clip):
    from stylewright.nodes.bridge.session import training_session

    model, clip = tiny("flux"), tiny_clip("flux")
    x_t, levels = torch.randn(2, 16, 8, 12), torch.tensor([-2.0, -2.0])
    with training_session(model), torch.no_grad():
        denoiser, prompts = denoiser_of(model, clip)
        rows = prompts.encode(["a", "a"])
        default = denoiser(x_t, levels, rows)
        stated = denoiser(x_t, levels, {**rows, "guidance": torch.tensor([3.5, 3.5])})
        mixed = denoiser(x_t, levels, {**rows, "guidance": torch.tensor([3.5, 1.0])})
    torch.testing.assert_close(default, stated)
    torch.testing.assert_close(mixed[0], stated[0])
    assert not torch.allclose(mixed[1], stated[1])


def test_ranges_and_kinds(tiny, tiny_clip):
    kinds = {}
    for family in FAMILIES:
        denoiser, _ = denoiser_of(tiny(family), tiny_clip(family))
        kinds[family] = (denoiser.family, denoiser.process, denoiser.prediction)
        if denoiser.process == "flow":
            assert denoiser.log_snr_range == (-math.inf, math.inf)
    assert kinds == {
        "sd15": ("sd15", "vp", "eps"), "sdxl": ("sdxl", "vp", "eps"), "flux": ("flux", "flow", "flow"),
        "sd3": ("sd3", "flow", "flow"), "pixart": ("pixart", "vp", "eps"), "qwen": ("qwen-image", "flow", "flow"),
    }  # fmt: skip
    assert denoiser_of(tiny("sd15"), tiny_clip("sd15"))[0].log_snr_range == pytest.approx((-5.364, 7.069), abs=1e-2)


def test_a_model_sampling_patch_is_respected(tiny, tiny_clip):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    patched = ModelSamplingDiscrete().patch(tiny("sd15"), "v_prediction", zsnr=True)[0]
    denoiser, _ = denoiser_of(patched, tiny_clip("sd15"))
    assert denoiser.prediction == "v"
    assert denoiser.log_snr_range[0] < -16


def test_a_model_without_a_noise_relation_is_refused(tiny, tiny_clip):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    patched = ModelSamplingDiscrete().patch(tiny("sd15"), "img_to_img", zsnr=False)[0]
    with pytest.raises(ValueError, match="IMG_TO_IMG"):
        denoiser_of(patched, tiny_clip("sd15"))
