"""Every family that ComfyUI draws pictures from words with, on a tiny random model; and why others are refused."""

import importlib.util
import math
import sys
from pathlib import Path

import comfy.latent_formats
import comfy.model_sampling
import pytest
import torch
from comfy import supported_models
from tiny_models import TINY, is_known, tiny_model

from stylewright.nodes.bridge.families import FAMILIES, REFUSED, family_of, latents_per_token, refuse_untrainable
from stylewright.nodes.bridge.noise_levels import noise_levels
from stylewright.training.adapters.keys_values import own_places, rows_of
from stylewright.training.adapters.targets import TARGETS, grouped, resolve_targets, target_patterns
from stylewright.training.formats.contents import read_adapter
from stylewright.training.noise import add_noise
from stylewright.training.predictions import target, to_x0_eps

pytestmark = pytest.mark.comfy

spec = importlib.util.spec_from_file_location("family_proof", Path(__file__).with_name("family_proof.py"))
proof = sys.modules["family_proof"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(proof)


# Tried at every change; the others, of which each shares its mechanisms with one of these, with --slow.
USUAL = (
    "sd15", "sd21", "sd21-v", "sdxl", "sd3", "flux", "flux2", "chroma", "pixart", "lumina2", "z-image", "qwen",
    "auraflow", "hidream", "hunyuan-dit", "cosmos", "cosmos-predict2", "wan21",
)  # fmt: skip


@pytest.fixture(params=[each if each in USUAL else pytest.param(each, marks=pytest.mark.slow) for each in TINY])
def family(request):
    """A key of the tiny models that this ComfyUI knows."""
    if not is_known(request.param):
        pytest.skip(f"this ComfyUI has no {TINY[request.param].kind}")
    return request.param


def test_a_run_leaves_a_file_for_the_stock_loader_and_the_model_as_it_was(family, tmp_path):
    parts = proof.load(family)
    before = proof.answer(parts.model, parts)
    with proof.counted(parts.model) as passes:
        path = proof.train(parts, tmp_path / "straight")
    again = proof.train_with_a_cancel(parts, tmp_path / "cancelled", len(passes))
    assert torch.equal(proof.answer(parts.model, parts), before)
    assert proof.same_content(path, again)
    trained, stock = proof.answer_as_trained(parts, path), proof.answer_of_stock_loader(parts, path)
    assert stock.unmatched == ()
    assert stock.layers == len(read_adapter(path).layers)
    assert proof.relative(trained, before) > 1e-2
    assert proof.relative(stock.answer, trained) < 1e-3
    assert read_adapter(path).about.family == family_of(parts.model) != "other"


def test_gradients_are_differences_of_the_loss(family):
    found = proof.gradients(proof.load(family))
    assert found.finite and found.foreign == ()
    assert found.slope == pytest.approx(found.difference, rel=1e-2)
    assert found.checkpointed == pytest.approx(found.slope, rel=1e-5)
    assert found.influence_of_idle == 0.0


def test_the_denoiser_means_what_comfyui_samples_with(family):
    theirs, ours = proof.answer_of_comfyui(proof.load(family), -1.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))


def test_tokens_are_counted_as_the_network_counts(family):
    parts = proof.load(family)
    side = latents_per_token(parts.model)
    if TINY[family].config.get("model_channels") and "use_spatial_transformer" in TINY[family].config:
        assert side == 2  # a UNet, counted like a transformer
        return
    rows = max(8, TINY[family].size[0] // side)
    few, many = (proof.tokens_of(parts, (rows * side, columns * side)) for columns in (72, 76))  # more than a text has
    assert many - few == rows * 4


@pytest.mark.parametrize("family", [each for each in TINY if is_known(each)])
@pytest.mark.parametrize("log_snr", [-5.0, 0.7, 4.0])
def test_noise_is_counted_as_comfyui_counts_it(family, log_snr):
    """Our mixture of unit data and noise is ComfyUI's of its latents, and so are data and prediction found in it."""
    model = tiny_model(family)
    levels, sampling = noise_levels(model), model.get_model_object("model_sampling")
    draw = torch.Generator().manual_seed(2)
    x0, eps, output = (torch.randn(2, 3, 4, 5, generator=draw) for _ in range(3))
    log_snrs = torch.full((2,), log_snr)
    x_t, sigma = add_noise(levels.process, x0, eps, log_snrs), levels.sigma(log_snrs)
    x = levels.comfy_input(x_t, log_snrs)
    torch.testing.assert_close(levels.log_snr(sigma), log_snrs, rtol=1e-4, atol=1e-4)
    if isinstance(sampling, vars(comfy.model_sampling).get("V_PREDICTION_DDPM", ())):
        torch.testing.assert_close(x, x_t)  # which ComfyUI's own noise_scaling does not give: see its node for VOID
    else:
        theirs = sampling.noise_scaling(sigma[:, None, None, None], eps.clone(), x0 * levels.data_scale)
        torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))
    data = sampling.calculate_denoised(sigma, output, x) / levels.data_scale
    _, noise = to_x0_eps("x0", data, levels.process, x_t, log_snrs)
    meant = target(levels.prediction, levels.process, data, noise, log_snrs)
    if levels.noise_scale == 1.0:  # else the network's output is another flow's, and the data are all that is the same
        sign = -1 if isinstance(sampling, comfy.model_sampling.EDM) else 1
        torch.testing.assert_close(meant, sign * output, rtol=1e-3, atol=2e-3)


def test_presets_find_layers_and_style_is_within_all(family):
    network = tiny_model(family).model.diffusion_model
    presets = TARGETS.get(family_of(tiny_model(family)), TARGETS["other"])
    found = {preset: resolve_targets(network, target_patterns("", patterns)) for preset, patterns in presets.items()}
    assert all(set(layers) <= set(found["all"]) for layers in found.values())
    assert set(found.get("cross-attention", found["attention"])) <= set(found["attention"])
    assert not any("norm" in name or "embed" in name or ".mod" in name for name in grouped(found["all"]))
    assert set(found["kv_text"]) <= set(found["kv_both"]) <= set(found["attention"])
    sizes = [network.get_submodule(name) for name in found["kv_both"]]
    rows = [
        rows_of(name, layer.in_features, layer.out_features)
        for name, layer in zip(found["kv_both"], sizes, strict=True)
    ]
    assert all(
        part is None or (part[0].stop == part[1].start and part[1].stop <= layer.out_features)
        for part, layer in zip(rows, sizes, strict=True)
    )


@pytest.mark.parametrize("family", ["sd15", "flux", "sd3", "lumina2", "hunyuan-dit"])
@pytest.mark.parametrize("preset", ["kv_text", "kv_both"])
def test_keys_and_values_alone_for_the_stock_loader(family, preset, tmp_path):
    parts = proof.load(family)
    before = proof.answer(parts.model, parts)
    path = proof.train(parts, tmp_path, targets=preset)
    trained, stock = proof.answer_as_trained(parts, path), proof.answer_of_stock_loader(parts, path)
    file = read_adapter(path)
    assert stock.unmatched == () and stock.layers == len(file.layers)
    assert proof.relative(trained, before) > 1e-3
    assert proof.relative(stock.answer, trained) < 1e-3
    for name, layer in file.layers.items():
        b, a = layer.tensors["B"], layer.tensors["A"]
        rows = rows_of(name, a.shape[1], len(b))
        if rows is not None:  # two adapters in one: nothing of queries, nothing of one's columns in the other's rows
            assert torch.equal(b != 0, (b != 0) & own_places(rows, len(b), len(a) // 2))
            assert all(b[part.start : part.stop].any() for part in rows)


def test_every_class_of_this_comfyui_is_trained_or_refused_by_name():
    listed = FAMILIES.keys() | REFUSED.keys()
    unlisted = [
        kind.__name__
        for kind in supported_models.models
        if not any(base.__name__ in listed for base in kind.__mro__)
        and kind.latent_format.latent_dimensions in (2, 3)  # others are refused for that
    ]
    assert unlisted == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_trained_is_refused_with_the_reason(name):
    if name not in vars(supported_models):
        pytest.skip(f"this ComfyUI has no {name}")
    model = tiny_model("sd15")
    kind = vars(supported_models)[name]
    model.model.model_config = kind.__new__(kind)
    with pytest.raises(ValueError, match=f"{name} cannot be trained on pictures and captions: {REFUSED[name][:20]}"):
        refuse_untrainable(model)


@pytest.mark.parametrize("base, changes", [
    ("sd15", {"in_channels": 9}), ("flux", {"in_channels": 96}), ("flux", {"in_channels": 32}),
    ("wan21", {"in_dim": 36}),
])  # fmt: skip
def test_a_model_that_draws_from_a_picture_too_is_refused(base, changes, monkeypatch):
    monkeypatch.setitem(TINY[base].config, *next(iter(changes.items())))
    with pytest.raises(ValueError, match=r"channels more than a latent has.*inpainting"):
        refuse_untrainable(tiny_model(base))


def test_a_model_of_sound_is_refused():
    model = tiny_model("sd15")
    model.add_object_patch("latent_format", comfy.latent_formats.StableAudio1())
    with pytest.raises(ValueError, match=r"SD15 cannot be trained.*1 dimension"):
        refuse_untrainable(model)


def test_a_refusal_comes_before_any_work(tmp_path):
    parts = proof.load("sd15")
    kind = supported_models.LotusD
    parts.model.model.model_config = kind.__new__(kind)
    parts.clip.encode_from_tokens_scheduled = None  # never asked
    with pytest.raises(ValueError, match=r"LotusD cannot be trained.*estimates depth"):
        proof.train(parts, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_class_younger_than_the_table_has_the_generic_presets():
    model = tiny_model("qwen")
    model.model.model_config = type("Newest", (supported_models.supported_models_base.BASE,), {})(TINY["qwen"].config)
    assert family_of(model) == "other"
    refuse_untrainable(model)


def test_patches_of_model_sampling_are_respected():
    from comfy_extras.nodes_model_advanced import (
        ModelSamplingContinuousEDM,
        ModelSamplingDiscrete,
        ModelSamplingFlux,
        ModelSamplingSD3,
    )

    # A shift changes a sampler's schedule, not what a noise level means.
    shifted, *_ = ModelSamplingSD3().patch(tiny_model("sd3"), 6.0)
    assert noise_levels(shifted) == noise_levels(tiny_model("sd3"))
    shifted, *_ = ModelSamplingFlux().patch(tiny_model("flux"), 1.15, 0.5, 1024, 1024)
    assert noise_levels(shifted) == noise_levels(tiny_model("flux"))
    patched, *_ = ModelSamplingDiscrete().patch(tiny_model("sdxl"), "v_prediction", zsnr=True)
    assert noise_levels(patched).prediction == "v" and noise_levels(patched).log_snr_range[0] < -16
    patched, *_ = ModelSamplingContinuousEDM().patch(tiny_model("sdxl"), "edm_playground_v2.5", 80.0, 0.002)
    levels = noise_levels(patched)
    assert (levels.process, levels.prediction, levels.data_scale) == ("vp", "v", 0.5)
    assert levels.log_snr_range == pytest.approx((-2 * math.log(160), -2 * math.log(0.004)))
