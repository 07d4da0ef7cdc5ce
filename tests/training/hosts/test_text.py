"""Text encoders inside of the denoiser: the same predictions, right gradients, complete files, and no trace."""

import warnings
from contextlib import ExitStack
from copy import copy
from functools import cache

import pytest
import torch

from stylewright.training.adapters.attach import attached_to_parts
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.data.dataset import Dataset, Example
from stylewright.training.formats.contents import read_adapter
from stylewright.training.gradients import differentiable
from stylewright.training.hosts.loading import load_host
from stylewright.training.hosts.text import as_tensor, as_text, with_text_encoders
from stylewright.training.loops.config import TrainConfig
from stylewright.training.loops.subject import parts_of
from stylewright.training.loops.train import train

ENCODERS = {"sd15": 1, "sdxl": 2, "sd3": 2, "flux": 1}
LOG_SNR = torch.tensor([-2.0, 1.0])


@pytest.fixture(scope="module")
def host_of(tiny_folder):
    """host_of(family) is a host, and another of it whose text encoders are inside. No test changes them."""

    @cache
    def make(family):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_host(tiny_folder(family)), with_text_encoders(load_host(tiny_folder(family)))

    return make


def config_of(**changes):
    plain = {"steps": 3, "accumulation": 1, "batch_size": 2, "learning_rate": 1e-2, "text_encoder_learning_rate": 1e-2}
    return TrainConfig(**{**plain, "adapter": AdapterConfig(rank=2, targets="all"), **changes})


def extras(host, rows):
    return {name: value.expand(rows, *value.shape[1:]) for name, value in host.training_conditioning.items()}


def latents(host, rows=2):
    return torch.randn(rows, host.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1))


def test_prompts_are_their_own_conditioning():
    prompts = ["", "a cat", "größe 猫 🐈", "x" * 600]
    assert as_text(as_tensor(prompts)) == prompts
    assert as_tensor(["a", "a much longer one"]).shape == (2, 512)


@pytest.mark.parametrize("family", ENCODERS)
def test_predictions_are_those_of_prompts_encoded_before(host_of, family):
    before, inside = host_of(family)
    prompts = ["a cat", "dogs"]
    x_t = latents(before)
    expected = before.denoiser(x_t, LOG_SNR, before.encode_prompts(prompts) | extras(before, 2))
    got = inside.denoiser(x_t, LOG_SNR, inside.encode_prompts(prompts) | extras(inside, 2))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(inside.text_encoders) == ENCODERS[family]


@pytest.mark.parametrize(("family", "checkpoint"), [("sd15", False), ("sdxl", True)])
def test_gradients_are_those_of_the_changed_weights(host_of, family, checkpoint):
    """B's gradient is that of the weight times A^T, which plain autograd on the unadapted encoder gives."""
    _, host = host_of(family)
    conditioning = host.encode_prompts(["a cat", "dogs"]) | extras(host, 2)
    x_t, config = latents(host), config_of()
    parts = parts_of(host.denoiser, config, host.text_encoders)
    weights = {
        f"{part.prefix}{name}": part.module.get_submodule(name).weight.requires_grad_()
        for part in parts[1:]
        for name in part.layers(config.adapter)
    }
    host.denoiser(x_t, LOG_SNR, conditioning).square().sum().backward()
    expected = {name: weight.grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(False).grad = None
    with attached_to_parts(parts, config.adapter, seed=0) as adapter:
        assert [name for name in adapter.names if name.startswith("text_encoder")] == list(weights)
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(differentiable(part.module, checkpoint=checkpoint))
            host.denoiser(x_t, LOG_SNR, conditioning).square().sum().backward()
        named = dict(zip(adapter.state_dict(), adapter.parameters(), strict=True))
        checked = 0
        for name, gradient in expected.items():
            a, b = (named[f"{name}.lora_{side}.weight"] for side in "AB")
            if gradient is None:  # a layer above the one that is read
                assert b.grad is None
                continue
            torch.testing.assert_close(b.grad, gradient @ a.T, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
            checked += 1
        assert checked >= 4
    assert not any(weight.requires_grad for weight in weights.values())
    assert all(weight.grad is None for weight in weights.values())


def dataset_of(host, dropout=0.3):
    draw = torch.Generator().manual_seed(2)
    examples = [
        Example(
            f"{i}.png", torch.randn(host.latent_channels, 8, 8, generator=draw), host.encode_prompts([text]), None, text
        )
        for i, text in enumerate(["a cat in ink style", "dogs in ink style"])
    ]
    return Dataset(examples, host.encode_prompts([""]), dropout)


def run(host, folder, config, report=None):
    return train(
        host.denoiser,
        dataset_of(host),
        config,
        run_dir=folder,
        report=report,
        conditioning=host.training_conditioning,
        unet_layers=host.unet_layers,
        text_encoders=host.text_encoders,
    )


def test_a_stopped_run_equals_the_straight_one_and_leaves_no_trace(host_of, tmp_path):
    config = config_of(
        adapter=AdapterConfig(method="dora", rank=2), ema_decay=0.5, report_every=1, text_encoder_targets="all"
    )
    _, host = host_of("sdxl")
    names = {prefix: list(dict(module.named_modules())) for prefix, module in host.text_encoders.items()}
    before = {
        prefix: {key: value.clone() for key, value in module.state_dict().items()}
        for prefix, module in host.text_encoders.items()
    }
    prediction = host.denoiser(latents(host), LOG_SNR, host.encode_prompts(["a cat", "dogs"]))
    straight = run(host, tmp_path / "straight", config).adapter_state

    def stop(event):
        if event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(host, tmp_path / "stopped", config, stop)
    for prefix, module in host.text_encoders.items():
        assert list(dict(module.named_modules())) == names[prefix]
        assert all(torch.equal(value, before[prefix][key]) for key, value in module.state_dict().items())
    assert torch.equal(host.denoiser(latents(host), LOG_SNR, host.encode_prompts(["a cat", "dogs"])), prediction)
    continued = run(host, tmp_path / "stopped", config).adapter_state
    assert straight.keys() == continued.keys()
    assert all(torch.equal(straight[name], continued[name]) for name in straight)
    changed = {name.split(".")[0] for name, value in straight.items() if "lora_B" in name and value.any()}
    assert {"text_encoder", "text_encoder_2"} <= changed
    files = [read_adapter(tmp_path / name / "adapter.safetensors") for name in ("straight", "stopped")]
    assert files[0].header == files[1].header
    assert all(torch.equal(tensor, files[1].tensors[key]) for key, tensor in files[0].tensors.items())


def test_rates_are_separate(host_of, tmp_path):
    """Adam's first step has the size of the learning rate, whatever the gradient."""
    _, host = host_of("sd15")
    config = config_of(steps=1, learning_rate=1e-2, text_encoder_learning_rate=3e-4, clip_norm=0.0)
    state = run(host, None, config).adapter_state
    sizes = {True: 0.0, False: 0.0}
    for name, value in state.items():
        if "lora_B" in name:
            text = name.startswith("text_encoder")
            sizes[text] = max(sizes[text], float(value.abs().max()))
    assert sizes[False] == pytest.approx(1e-2, rel=1e-3) and sizes[True] == pytest.approx(3e-4, rel=1e-3)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_diffusers_loads_the_file_complete(host_of, tiny_folder, tmp_path, caplog, family):
    """``load_lora_weights`` takes every tensor, and the pipeline then conditions as training did."""
    from diffusers import DiffusionPipeline

    _, host = host_of(family)
    config = config_of(text_encoder_targets="all", adapter=AdapterConfig(rank=2, alpha=3.0))
    state = run(host, tmp_path, config).adapter_state
    path = tmp_path / "adapter.safetensors"
    text = [name for name in read_adapter(path).layers if name.startswith("text_encoder")]
    assert len(text) == ENCODERS[family] * 2 * 6
    prompts = ["a cat in ink style"]
    with attached_to_parts(parts_of(host.denoiser, config, host.text_encoders), config.adapter, seed=0) as adapter:
        adapter.load_state_dict(state)
        with torch.no_grad():
            conditioning = host.encode_prompts(prompts) | extras(host, 1)
            expected = host.denoiser(latents(host, 1), LOG_SNR[:1], conditioning)
    plain, _ = host_of(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(tiny_folder(family), local_files_only=True)
        caplog.clear()
        pipeline.load_lora_weights(str(path))
    assert not [record.message for record in caplog.records if "key" in record.message.lower()]
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    adapted = sum(
        hasattr(module, "lora_A")
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) and name.startswith("text_encoder")
        for module in part.modules()
    )
    assert adapted == len(text)
    patched = copy(plain.denoiser)
    patched.module = network
    conditioning = _encode(family, pipeline, prompts) | extras(plain, 1)
    with torch.no_grad():
        got = patched(latents(plain, 1), LOG_SNR[:1], conditioning)
    with torch.no_grad():
        unadapted = plain.denoiser(latents(plain, 1), LOG_SNR[:1], plain.encode_prompts(prompts) | extras(plain, 1))
    assert (got - expected).norm() < 1e-3 * expected.norm() < (unadapted - expected).norm()


def test_the_command_line_draws_with_the_whole_file(host_of, tmp_path):
    from stylewright.training.cli.generate import wearing

    before, host = host_of("sdxl")
    config = config_of(text_encoder_learning_rate=0.1)
    state = run(host, tmp_path, config).adapter_state
    prompts = ["a cat in ink style"]
    with attached_to_parts(parts_of(host.denoiser, config, host.text_encoders), config.adapter, seed=0) as adapter:
        adapter.load_state_dict(state)
        with torch.no_grad():
            expected = host.denoiser(latents(host, 1), LOG_SNR[:1], host.encode_prompts(prompts))
    with wearing(before, tmp_path / "adapter.safetensors") as (worn, phrase, _), torch.no_grad():
        got = worn.denoiser(latents(worn, 1), LOG_SNR[:1], worn.encode_prompts(prompts))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert phrase == ""


def _encode(family, pipeline, prompts):
    from stylewright.training.hosts import flux, sd3, unet

    encode = {"flux": flux.encode, "sd3": sd3.encode, **unet.ENCODE}[family]
    with torch.no_grad():
        return encode(pipeline, prompts, "cpu")


def test_what_cannot_be_trained_is_refused(host_of, tiny_folder):
    with pytest.raises(ValueError, match=r"pixart.* has no CLIP text encoder"):
        with_text_encoders(load_host(tiny_folder("pixart")))
    with pytest.raises(ValueError, match="has no CLIP text encoder"):
        with_text_encoders(load_host("embedded"))
    before, _ = host_of("sd15")
    with pytest.raises(ValueError, match="without a CLIP text encoder"):
        run(before, None, config_of())
    with pytest.raises(ValueError, match="one estimate for all parameters"):
        config_of(optimizer="prodigy", learning_rate=1.0, text_encoder_learning_rate=0.5)
    with pytest.raises(ValueError, match="text_encoder_targets"):
        config_of(text_encoder_targets="mlp")
