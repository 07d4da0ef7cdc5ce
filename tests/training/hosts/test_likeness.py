"""A CLIP and a small decoder from disk, against the libraries' own answers."""

import pytest
import torch

from stylewright.training.hosts.likeness import open_clip, open_tiny_decoder
from stylewright.training.hosts.loading import load_host

from .conftest import CLIP_END, clip_tokenizer


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    text = {
        "vocab_size": CLIP_END + 1,
        "eos_token_id": CLIP_END,
        "bos_token_id": CLIP_END - 1,
        "pad_token_id": CLIP_END,
    }
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"text_config": {**small, **text}, "vision_config": {**small, "image_size": 32, "patch_size": 8}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(**sizes, projection_dim=12)).save_pretrained(folder)
    tokenizer = clip_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory):
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("taesd")
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderTiny(**blocks, **counts, latent_channels=4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "tolerance"), [((32, 32), 1e-4), ((80, 48), 0.03)])
def test_clips_features_are_those_of_transformers(clip_folder, size, tolerance):
    """Pictures of CLIP's own size to the bit of a byte; others but for another bicubic filter."""
    from transformers import CLIPModel, CLIPProcessor

    grid = torch.linspace(0, 1, size[0])[:, None] * torch.linspace(0.2, 1, size[1])
    pictures = (torch.stack([torch.stack([grid, 1 - grid, grid.square()])] * 2) * 255).round() / 255
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    bytes_ = [(each * 255).round().byte().movedim(0, -1).numpy() for each in pictures]
    prompts = ["a cat", "a dog in a long sentence"]
    told = processor(text=prompts, images=bytes_, return_tensors="pt", padding="max_length", max_length=77)
    expected = model(**told)
    found = open_clip(clip_folder, "cpu")
    made = torch.nn.functional.normalize(found.pictures(pictures), dim=1)
    torch.testing.assert_close(made, expected.image_embeds, atol=tolerance, rtol=0)
    texts = torch.nn.functional.normalize(found.texts(prompts), dim=1)
    torch.testing.assert_close(texts, expected.text_embeds, atol=1e-5, rtol=0)


def test_gradients_reach_pictures_and_no_weights(clip_folder):
    features = open_clip(clip_folder, "cpu")
    pictures = torch.rand(1, 3, 40, 40).requires_grad_()
    features.pictures(pictures).sum().backward()
    assert pictures.grad.any()
    assert not features.texts(["a cat"]).requires_grad


def test_the_tiny_decoder_is_that_of_diffusers_with_gradients(tiny_decoder):
    from diffusers import AutoencoderTiny

    latents = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0)).requires_grad_()
    pictures = open_tiny_decoder(tiny_decoder, 4, "cpu")(latents)
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(tiny_decoder).decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(pictures, expected.clamp(0, 1))
    pictures.sum().backward()
    assert latents.grad.any()


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_a_models_own_decoder_stays_and_has_gradients(tiny_folder, family):
    host = load_host(tiny_folder(family))
    latents = torch.randn((2, host.latent_channels, 4, 4), generator=torch.Generator().manual_seed(0)).requires_grad_()
    pictures = host.open_decoder()(latents)
    torch.testing.assert_close(pictures, host.decode_latents(latents.detach()))
    pictures.sum().backward()
    assert latents.grad.any()


def test_other_folders_are_named(clip_folder, tiny_decoder, tmp_path):
    with pytest.raises(ValueError, match="expected a CLIP of transformers"):
        open_clip(tiny_decoder, "cpu")
    with pytest.raises(ValueError, match="cannot read"):
        open_clip(tmp_path, "cpu")
    with pytest.raises(ValueError, match="expected an AutoencoderTiny"):
        open_tiny_decoder(clip_folder, 4, "cpu")
    with pytest.raises(ValueError, match="latents of 4 channels, and the model has 16"):
        open_tiny_decoder(tiny_decoder, 16, "cpu")
