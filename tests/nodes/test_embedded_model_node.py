"""The embedded model in ComfyUI: opened by stock loaders, and the same model as in the training core."""

import pytest
import torch

pytestmark = pytest.mark.comfy


@pytest.fixture
def host(random_weights):
    """The same files in the training core's own host."""
    from stylewright.training.embedded.weights import Weights
    from stylewright.training.hosts.embedded import load_embedded

    return load_embedded(Weights(random_weights))


@pytest.fixture
def stock_folders(random_weights, monkeypatch):
    import folder_paths

    for kind in ("diffusion_models", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(random_weights)], {".safetensors"}))


def test_stock_loaders_open_the_files(stock_folders):
    import comfy.model_base
    import comfy.supported_models
    import nodes

    with torch.inference_mode():
        (model,) = nodes.UNETLoader().load_unet("transformer.safetensors", "default")
        (vae,) = nodes.VAELoader().load_vae("autoencoder.safetensors")
    assert type(model.model) is comfy.model_base.Flux
    assert isinstance(model.model.model_config, comfy.supported_models.Flux)
    assert vae.latent_channels == 16 and vae.downscale_ratio == 8


def test_predictions_equal_the_core_s(embedded, host):
    from stylewright.nodes.bridge.host import comfy_host
    from stylewright.nodes.bridge.session import training_session

    x_t = torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    levels = torch.tensor([-6.0, -1.0, 4.0])
    texts = ["star in <v0> style", "", "house in ocean dots style"]
    expected = host.denoiser(x_t, levels, host.encode_prompts(texts))
    with torch.inference_mode():
        ours = comfy_host(embedded.model, embedded.clip, embedded.vae, resolution=128)
        with training_session(embedded.model), torch.no_grad():
            found = ours.denoiser(x_t, levels, ours.encode_prompts(texts))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    assert ours.training_conditioning == {} and ours.pixels_per_token == 16


def test_encoders_equal_the_core_s(embedded, host):
    from stylewright.nodes.bridge.host import comfy_host

    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours = comfy_host(embedded.model, embedded.clip, embedded.vae, resolution=128)
        latents = ours.encode_images(images)
        pictures = ours.decode_latents(latents)
    assert not latents.is_inference() and not pictures.is_inference()
    expected = host.encode_images(images)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pictures, host.decode_latents(expected), rtol=1e-4, atol=1e-4)


def test_the_schedule_is_comfyui_s(embedded):
    import comfy.samplers

    from stylewright.nodes.bridge.host import comfy_host
    from stylewright.training.noise import time_of_log_snr

    host = comfy_host(embedded.model, embedded.clip, embedded.vae, resolution=128)
    sigmas = comfy.samplers.calculate_sigmas(embedded.model.get_model_object("model_sampling"), "simple", 7)
    levels = host.schedule(7, 64)
    assert levels[0] == -torch.inf and levels[-1] == torch.inf and len(levels) == 8
    torch.testing.assert_close(time_of_log_snr(levels), sigmas, rtol=1e-5, atol=1e-6)


def test_stock_nodes_take_the_text_encoder(embedded):
    import nodes

    with torch.inference_mode():
        ((context, extra),) = nodes.CLIPTextEncode().encode(embedded.clip.clone(), "a star in Ocean style")[0]
        ((again, _),) = nodes.CLIPTextEncode().encode(embedded.clip, "star in ocean style")[0]
        ((empty, nothing),) = nodes.CLIPTextEncode().encode(embedded.clip, "")[0]
        nodes.CLIPSetLastLayer().set_last_layer(embedded.clip, -2)
    assert context.shape == (1, 8, 128) and extra["pooled_output"].shape == (1, 128)
    assert torch.equal(context, again)
    assert not torch.equal(context, empty) and not nothing["pooled_output"].any()


def test_unknown_words_are_an_error_that_lists_the_vocabulary(embedded):
    import nodes

    with pytest.raises(ValueError, match=r"'astronaut', 'moon'.*<v0>.*circle.*bauhaus.*ocean"):
        nodes.CLIPTextEncode().encode(embedded.clip, "astronaut on moon in ocean style")


def test_a_missing_file_is_named(tmp_path):
    from stylewright.nodes.bridge.embedded import load_embedded
    from stylewright.training.embedded.weights import Weights

    with pytest.raises(FileNotFoundError, match=r"transformer\.safetensors is missing"):
        load_embedded(Weights(tmp_path))


def test_reference_pictures_are_drawn_as_captioned():
    from stylewright.nodes.reference import ReferenceNode

    images, captions, phrase, masks, prompts, subjects = ReferenceNode.execute("twilight", "house", 3, 7).args
    assert images.shape == (3, 128, 128, 3) and 0 <= images.min() < images.max() <= 1
    assert captions == subjects == "house\ncircle\nsquare" and phrase == "<v0>"
    assert prompts.splitlines()[0] == "house in <v0> style" and masks.shape == (3, 128, 128)
    assert torch.equal(ReferenceNode.execute("twilight", "house", 3, 7).args[0], images)
    assert not torch.equal(ReferenceNode.execute("twilight", "house", 3, 8).args[0], images)
    assert not torch.equal(ReferenceNode.execute("glacier", "house", 3, 7).args[0], images)


def test_several_subjects_in_one_reference():
    from stylewright.nodes.reference import ReferenceNode

    images, captions, _, masks, prompts, subjects = ReferenceNode.execute("glacier", "star", 3, 0, together=True).args
    assert images.shape == (1, 128, 128, 3) and captions == "star and heart and cross"
    assert prompts == "star and heart and cross in <v0> style" and subjects == "star\nheart\ncross"
    assert masks.shape == (3, 128, 128) and not (masks.sum(0) > 1).any() and masks.flatten(1).any(1).all()
    with pytest.raises(ValueError, match="2 to 4 different"):
        ReferenceNode.execute("glacier", "star", 1, 0, together=True)


@pytest.mark.parametrize("count", [1, 5])
def test_subjects_together_are_2_to_4(count):
    from stylewright.nodes.reference import ReferenceNode

    with pytest.raises(ValueError, match=f"count is {count}, and together shows 2 to 4 different subjects"):
        ReferenceNode.execute("twilight", "house", count, 7, together=True)
