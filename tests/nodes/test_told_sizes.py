"""What a model is told of a picture's sizes: in ComfyUI what diffusers tells, and nothing where it takes none."""

import pytest
import torch
from tiny_models import TINY, TinyClip, TinyVae, tiny_model

pytestmark = pytest.mark.comfy

# In latent pixels of the families' tiny models, and in pixels: a picture that was cut, and an enlarged crop.
SIZES = [[900, 1000, 0, 56, 128, 192], [210, 210, 0, 0, 128, 192]]
TOLD = ("sdxl", "sdxl-v", "sdxl-refiner", "pixart-alpha", "pixart", "hunyuan-dit", "hunyuan-dit1")


def host_of(family, answers=None):
    from stylewright.nodes.bridge.host import comfy_host

    model = tiny_model(family)
    clip = None if answers else TinyClip(family)
    host = comfy_host(model, clip, TinyVae(family, film=False), resolution=64, answers=answers)
    return model, host


def told_of(family, conditioning, answers=None):
    """The keyword arguments of the network's call, and the answer, with ``conditioning`` besides two prompts."""
    from stylewright.nodes.bridge.session import training_session

    model, host = host_of(family, answers)
    seen = []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    x_t = torch.randn(2, TINY[family].channels, *TINY[family].size, generator=torch.Generator().manual_seed(1))
    with training_session(model), torch.no_grad():
        rows = host.encode_prompts(list(answers) if answers else ["a cat", "a dog"])
        answer = host.denoiser(x_t, torch.tensor([-1.0, 1.0]), {**rows, **conditioning})
    hook.remove()
    return seen[0], answer


def embedded(numbers):
    """As diffusers' UNet of SDXL embeds its time ids (b, n), to (b, 256 n)."""
    from diffusers.models.embeddings import Timesteps

    project = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return project(numbers.flatten()).reshape(len(numbers), -1)


def test_sdxl_is_told_what_diffusers_tells():
    sizes = torch.tensor(SIZES)
    seen, told = told_of("sdxl", {"sizes": sizes})
    torch.testing.assert_close(seen["y"][:, 1280:], embedded(sizes), rtol=1e-5, atol=2e-4)
    default, plain = told_of("sdxl", {})
    height, width = (8 * side for side in TINY["sdxl"].size)
    own = torch.tensor([[height, width, 0, 0, height, width]] * 2)
    torch.testing.assert_close(default["y"][:, 1280:], embedded(own), rtol=1e-5, atol=2e-4)
    assert torch.equal(told_of("sdxl", {"sizes": own})[1], plain) and not torch.equal(told, plain)


def test_the_refiner_is_told_of_the_original_and_the_cut():
    sizes = torch.tensor(SIZES)
    seen, _ = told_of("sdxl-refiner", {"sizes": sizes})
    scored = torch.cat([sizes[:, :4], torch.full((2, 1), 6)], 1)  # ComfyUI's aesthetic score of what is wanted
    torch.testing.assert_close(seen["y"][:, 1280:], embedded(scored), rtol=1e-5, atol=2e-4)


def test_pixart_is_told_of_the_original_and_the_ratio_that_is_kept():
    seen, _ = told_of("pixart-alpha", {"sizes": torch.tensor(SIZES)})
    assert seen["c_size"].tolist() == [[900, 1000], [210, 210]]
    torch.testing.assert_close(seen["c_ar"], torch.full((2, 1), 128 / 192))


def test_hunyuan_dit_is_told_of_the_original_and_of_what_is_kept():
    seen, _ = told_of("hunyuan-dit1", {"sizes": torch.tensor(SIZES)})
    assert seen["image_meta_size"].tolist() == [[900, 1000, 128, 192, 0, 0], [210, 210, 128, 192, 0, 0]]


def test_a_conditioning_that_states_sizes_keeps_them():
    """Of ComfyUI's CLIPTextEncodeSDXL."""
    from tiny_models import tiny_conditioning

    ((text, rest),) = tiny_conditioning("sdxl", 3, 0)
    stated = {"width": 640, "height": 512, "crop_w": 3, "crop_h": 4, "target_width": 64, "target_height": 48}
    answers = {"one": {**rest, **stated, "cross_attn": text}, "other": {**rest, "cross_attn": text}}
    seen, _ = told_of("sdxl", {"sizes": torch.tensor(SIZES)}, answers)
    expected = torch.tensor([[512, 640, 4, 3, 48, 64], SIZES[1]])
    torch.testing.assert_close(seen["y"][:, 1280:], embedded(expected), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd15", "flux", "sd3", "pixart-alpha", "hunyuan-dit", "qwen"])
def test_a_dataset_states_sizes_to_models_that_take_them(family):
    from stylewright.training.data.encoding import encode
    from stylewright.training.data.items import items_from_memory

    _, host = host_of(family)
    assert host.told_sizes == (family in TOLD)
    side = 4 * host.pixels_per_token
    items = items_from_memory([torch.rand(3, side // 2, side // 2)], "a cat")
    with torch.inference_mode():
        batch = encode(items, host, resolution=side, style_phrase="ink").batch(0, 0, 0, 2)
    if family in TOLD:
        assert batch.conditioning["sizes"].tolist() == [[side // 2, side // 2, 0, 0, side, side]] * 2
    else:
        assert "sizes" not in batch.conditioning
