"""Opening models from disk, and what is said when one cannot be opened."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylewright.training.hosts.generate import generate
from stylewright.training.hosts.loading import load_host

FAMILIES = ["flux", "schnell", "sd3", "sdxl", "sd15", "sd2_v", "pixart", "pixart_sigma"]
PROMPTS = ["a cat", "two dogs in a boat"]


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """copied(family) is a folder that the test may damage."""
    return lambda family: shutil.copytree(tiny_folder(family), tmp_path / family)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_weights(folder, *parts):
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()


def assert_same_weights(module, expected):
    ours, theirs = module.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


def assert_same_encoders(host, expected):
    images = torch.rand(2, 3, 16, 24)
    for name, value in expected.encode_prompts(PROMPTS).items():
        assert torch.equal(host.encode_prompts(PROMPTS)[name], value)
    assert torch.equal(host.encode_images(images), expected.encode_images(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_opens_and_draws_without_touching_the_global_generator(tiny_folder, family):
    folder, before = tiny_folder(family), torch.get_rng_state()
    host = load_host(str(folder))
    latents = host.encode_images(torch.full((2, 3, 16, 24), 0.5))
    assert latents.shape == (2, host.latent_channels, 8, 12)
    assert generate(host, PROMPTS[:1], seed=0, steps=2, size=(16, 24)).shape == (1, 3, 16, 24)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in host.denoiser.module.parameters())
    assert (host.name, host.device) == (str(folder), "cpu")


def test_the_autoencoder_is_diffusers_with_its_scale_and_shift(tiny_folder):
    from diffusers import AutoencoderKL

    host, images = load_host(tiny_folder("sd3")), torch.rand(3, 3, 16, 24)
    vae = AutoencoderKL.from_pretrained(tiny_folder("sd3"), subfolder="vae")
    with torch.no_grad():
        expected = (vae.encode(2 * images - 1).latent_dist.mean - 0.0609) * 1.5305
        torch.testing.assert_close(host.encode_images(images), expected, rtol=1e-4, atol=1e-5)
        picture = vae.decode(expected / 1.5305 + 0.0609).sample
    torch.testing.assert_close(host.decode_latents(expected), (picture / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_half_precision_is_of_the_networks_and_not_of_the_autoencoder(tiny_folder):
    host = load_host(tiny_folder("sdxl"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in host.denoiser.module.parameters()} == {torch.bfloat16}
    conditioning = host.encode_prompts(PROMPTS)
    assert {value.dtype for value in conditioning.values()} == {torch.bfloat16}
    latents = host.encode_images(torch.rand(2, 3, 16, 24))
    full = load_host(tiny_folder("sdxl"))
    assert latents.dtype == torch.float32
    prediction = host.denoiser(latents, torch.tensor([-3.0, 2.0]), conditioning)
    assert prediction.dtype == torch.float32
    expected = full.denoiser(latents, torch.tensor([-3.0, 2.0]), full.encode_prompts(PROMPTS))
    torch.testing.assert_close(prediction, expected, rtol=0.1, atol=0.1)


def test_a_folder_with_half_precision_files_only_opens(tiny_folder, tmp_path):
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(tiny_folder("sd15")).save_pretrained(tmp_path / "half", variant="fp16")
    host, expected = load_host(tmp_path / "half"), load_host(tiny_folder("sd15"))
    assert_same_weights(host.denoiser.module, expected.denoiser.module)
    assert_same_encoders(host, expected)


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "sd15", "pixart"])
def test_a_single_file_is_the_same_model_as_its_folder(tiny_folder, tiny_file, copied, family):
    expected, components = load_host(tiny_folder(family)), copied(family)
    remove_weights(components, "transformer", "unet")
    host = load_host(tiny_file(family), components=components)
    assert_same_weights(host.denoiser.module, expected.denoiser.module)
    assert_same_encoders(host, expected)
    assert host.name == str(tiny_file(family))


def test_a_whole_checkpoint_needs_configurations_and_tokenizers_only(tiny_folder, tiny_file, copied):
    components = copied("sd15")
    remove_weights(components, "unet", "vae", "text_encoder")
    host = load_host(tiny_file("sd15"), components=components)
    assert_same_encoders(host, load_host(tiny_folder("sd15")))


def test_a_flux_file_needs_no_configuration_of_its_transformer(tiny_file, copied):
    components = copied("flux")
    shutil.rmtree(components / "transformer")
    assert load_host(tiny_file("flux"), components=components).denoiser.module.config.num_single_layers == 2


def test_a_unet_alone_opens_without_its_prefix(tiny_folder, tiny_file, tmp_path):
    state = {key.removeprefix("model.diffusion_model."): v for key, v in load_file(tiny_file("sdxl")).items()}
    save_file(state, tmp_path / "unet.safetensors")
    host = load_host(tmp_path / "unet.safetensors", components=tiny_folder("sdxl"))
    assert_same_weights(host.denoiser.module, load_host(tiny_folder("sdxl")).denoiser.module)


def test_marks_of_v_prediction_in_the_file_win_over_the_folder(tiny_folder, tiny_file, tmp_path):
    save_file(load_file(tiny_file("sd15")) | {"v_pred": torch.tensor([])}, tmp_path / "v.safetensors")
    denoiser = load_host(tmp_path / "v.safetensors", components=tiny_folder("sd15")).denoiser
    assert (denoiser.prediction, round(denoiser.log_snr_range[0], 2)) == ("v", -5.36)
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(load_file(tiny_file("sd15")) | marks, tmp_path / "z.safetensors")
    denoiser = load_host(tmp_path / "z.safetensors", components=tiny_folder("sd15")).denoiser
    assert denoiser.log_snr_range[0] < -14


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be opened


def refused(message, model, **options):
    with pytest.raises(ValueError, match=message):
        load_host(model, **options)


def test_what_is_no_model(tmp_path):
    refused("no model at .*nowhere", tmp_path / "nowhere")
    refused("it has no model_index.json", tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    refused("not a .safetensors file; other formats can run code", tmp_path / "model.ckpt")
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    refused("not a checkpoint of a supported family.*lora_unet_down.lora_up.weight", tmp_path / "lora.safetensors")


def test_a_truncated_file(tiny_folder, tiny_file, copied, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(tiny_file("flux").read_bytes()[:-100])
    refused("cannot read .*cut.safetensors", tmp_path / "cut.safetensors", components=tiny_folder("flux"))
    folder = copied("sd15")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("cannot read the unet .*UNet2DConditionModel.* of .*sd15", folder)


def test_a_single_file_without_components(tiny_file):
    for family in ("flux", "sd3", "sdxl", "sd15", "pixart"):
        refused(f"is a {family} checkpoint.*--components FOLDER", tiny_file(family))


def test_components_of_another_family(tiny_folder, tiny_file):
    refused(
        "is a flux checkpoint, but --components .*sdxl is a sdxl model",
        tiny_file("flux"),
        components=tiny_folder("sdxl"),
    )
    refused("leave --components out", tiny_folder("flux"), components=tiny_folder("flux"))


def test_parts_that_are_not_on_disk_are_all_named(copied, tiny_file):
    folder = copied("flux")
    remove_weights(folder, "text_encoder_2", "vae")
    shutil.rmtree(folder / "tokenizer")
    lacks = (
        r"lacks vae \(AutoencoderKL\) in .*tokenizer \(\w+\) in .*text_encoder_2 \(T5EncoderModel\) in .*text_encoder_2"
    )
    refused(lacks + r"\. .*nothing is downloaded", folder)
    refused(lacks + r"\. .*--components names the folder", tiny_file("flux"), components=folder)
    edit(folder / "model_index.json", scheduler=[None, None])
    refused(r"scheduler \(model_index.json says \[None, None\]\)", folder)


def test_weights_that_are_missing_in_a_file(copied, tiny_folder, tiny_file, tmp_path):
    folder = copied("sd15")
    weights = next((folder / "unet").glob("*.safetensors"))
    save_file({key: value for key, value in load_file(weights).items() if key != "conv_in.weight"}, weights)
    refused("1 of its weights are missing, for example conv_in.weight", folder)
    for family, key in {
        "sd15": "model.diffusion_model.out.2.weight",
        "sd3": "final_layer.linear.weight",
        "flux": "model.diffusion_model.img_in.weight",
        "pixart": "final_layer.linear.weight",
    }.items():
        state = load_file(tiny_file(family))
        del state[key]
        save_file(state, tmp_path / "part.safetensors")
        refused("cannot read the (unet|transformer)", tmp_path / "part.safetensors", components=tiny_folder(family))


def test_other_kinds_of_models(copied):
    folder = copied("sd15")
    edit(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    refused("holds a StableDiffusionInpaintPipeline, expected one of FluxPipeline", folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline", vae=["diffusers", "AutoencoderTiny"])
    refused("has the autoencoder .*AutoencoderTiny.*, expected AutoencoderKL", folder)
    (folder / "model_index.json").write_text("[]")
    refused("expected a JSON object, got list", folder)
    (folder / "model_index.json").write_text("{")
    refused("cannot read .*model_index.json", folder)


def test_models_that_read_more_than_a_latent(copied):
    folder = copied("sd15")
    weights = next((folder / "unet").glob("*.safetensors"))
    state = load_file(weights)
    save_file(state | {"conv_in.weight": torch.zeros(8, 9, 3, 3)}, weights)
    edit(folder / "unet" / "config.json", in_channels=9)
    refused("not a text-to-image model: its input has 9 channels, its latents have 4", folder)
