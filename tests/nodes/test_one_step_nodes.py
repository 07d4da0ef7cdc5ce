"""The one-step nodes: presets, sizes, seeds, guidance, progress, and what they refuse."""

import pytest
import torch
from one_step_runs import calls_of, noise_of, one_step, parts, relative, stock
from tiny_models import TINY, is_known

pytestmark = pytest.mark.comfy


@pytest.fixture
def sdxl(tiny):
    return tiny("sdxl")


@pytest.fixture
def prompt(tiny_prompt):
    return tiny_prompt("sdxl", 5)


def zeros(batch=1, channels=4, side=8):
    return {"samples": torch.zeros(batch, channels, side, side)}


def test_the_parts_draw_what_the_node_draws(sdxl, prompt):
    from comfy_extras.nodes_custom_sampler import BasicGuider, RandomNoise, SamplerCustomAdvanced

    for preset in ("DMD2 SDXL, 1 step", "SDXL-Turbo", "DMD2 SDXL, 4 steps", "SDXL-Lightning, 2 to 8 steps"):
        sampler, sigmas, _ = parts(sdxl, preset=preset)
        with torch.inference_mode():
            guider, noise = BasicGuider.execute(sdxl, prompt).args[0], RandomNoise.execute(3).args[0]
            out, denoised = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, zeros(2)).args
        ours = one_step(sdxl, prompt, zeros(2), preset=preset)
        assert torch.equal(out["samples"], ours["samples"])
        torch.testing.assert_close(denoised["samples"], out["samples"])


def test_the_information_says_the_levels(sdxl, tiny):
    assert parts(sdxl, preset="DMD2 SDXL, 1 step")[2] == (
        "DMD2 SDXL, 1 step: time 399 (sigma 1.161, log_snr -0.30), from unit noise"
    )
    assert "time 0.75 (sigma 0.75, log_snr -2.20)" in parts(tiny("flux-schnell"), preset="FLUX.1-schnell")[2]
    assert "from sigma x noise" in parts(tiny("sd15"), preset="SiD-LSG (SD)")[2]


@pytest.mark.parametrize(("unit", "value"), [("time", "399"), ("sigma", "1.1606"), ("log_snr", "-0.2978")])
def test_a_level_may_be_stated_in_any_unit(unit, value, sdxl):
    _, sigmas, _ = parts(sdxl, levels=value, unit=unit)
    assert sigmas.tolist() == pytest.approx([1.16058, 0], abs=1e-4)


def test_levels_of_ones_own(sdxl, tiny):
    times = sdxl.get_model_object("model_sampling").timestep(parts(sdxl, levels="999, 749\n499 249")[1][:-1])
    assert times.tolist() == [999, 749, 499, 249]
    own = parts(sdxl, steps=4)[1]
    torch.testing.assert_close(own, parts(sdxl, levels="999 749 499 249")[1], rtol=1e-6, atol=0)
    assert parts(tiny("sd3"), levels="1000, 500")[1].tolist() == pytest.approx([1, 0.5, 0])
    halves = sdxl.get_model_object("model_sampling").timestep(parts(sdxl, steps=4, denoise=0.5)[1][:-1])
    assert halves.tolist() == [499, 374, 249, 124]


def test_every_preset_draws_with_the_models_of_its_families(tiny, tiny_prompt):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    from stylewright.training.one_step_presets import ONE_STEP_PRESETS

    tried = {"flux": "flux-schnell"}
    for name, preset in ONE_STEP_PRESETS.items():
        for family in preset.families:
            family = tried.get(family, family)
            model, side = tiny(family), 320 if family == "pixart" else 64
            if preset.prediction == "x0":
                (model,) = ModelSamplingDiscrete().patch(model, "x0", False)
            with calls_of(model) as calls:
                drawn = one_step(model, tiny_prompt(family, 5), preset=name, width=side, height=side)
            assert len(calls) == preset.steps[0], name
            assert torch.isfinite(drawn["samples"]).all() and drawn["samples"].shape[1] == TINY[family].channels
            if preset.prediction == "x0":
                assert relative(model.model.process_latent_in(drawn["samples"]), calls[0].prediction) < 1e-5


def test_a_model_that_is_set_to_lcm(sdxl, prompt):
    """50 of the 1000 times, and an answer that is mixed with a little of the input."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (model,) = ModelSamplingDiscrete().patch(sdxl, "lcm", False)
    with calls_of(model) as calls:
        one_step(model, prompt, zeros(), preset="LCM, TCD")
    assert [int(call.time[0]) for call in calls] == [999, 759, 499, 259]


@pytest.mark.parametrize("preset", ["DMD2 SDXL, 1 step", "DMD2 SDXL, 4 steps"])
def test_a_picture_of_a_batch_is_the_same_alone(preset, sdxl, prompt):
    batch = one_step(sdxl, prompt, zeros(3), preset=preset)["samples"]
    for index in range(3):
        alone = one_step(sdxl, prompt, zeros() | {"batch_index": [index]}, preset=preset)["samples"]
        assert relative(alone, batch[index : index + 1]) < 1e-5
    again = one_step(sdxl, prompt, zeros(3), preset=preset)["samples"]
    assert torch.equal(again, batch)
    assert relative(one_step(sdxl, prompt, zeros(3), preset=preset, seed=4)["samples"], batch) > 0.1


def test_without_guidance_there_is_no_second_pass(sdxl, prompt, tiny_prompt):
    negative = tiny_prompt("sdxl", 5, 2)
    with calls_of(sdxl) as calls:
        alone = one_step(sdxl, prompt, zeros(), preset="SDXL-Turbo")["samples"]
        ignored = one_step(sdxl, prompt, zeros(), negative, preset="SDXL-Turbo")["samples"]
    assert [len(call.x) for call in calls] == [1, 1] and torch.equal(alone, ignored)
    uncond = one_step(sdxl, negative, zeros(), preset="SDXL-Turbo")["samples"]
    guided = one_step(sdxl, prompt, zeros(), negative, preset="SDXL-Turbo", cfg=2.5)["samples"]
    assert relative(guided, uncond + 2.5 * (alone - uncond)) < 1e-4


@pytest.mark.parametrize(
    ("family", "shape"),
    [("sdxl", (2, 4, 16, 24)), ("flux", (2, 16, 16, 24)), ("flux2", (2, 128, 8, 12)), ("qwen", (2, 16, 1, 16, 24))],
)
def test_a_size_is_made_a_latent_of_the_models_shape(family, shape, tiny, tiny_prompt):
    if not is_known(family):
        pytest.skip("a family that this ComfyUI does not know")
    drawn = one_step(tiny(family), tiny_prompt(family, 5), width=192, height=128, batch_size=2)
    assert drawn["samples"].shape == shape and drawn.keys() == {"samples"}


def test_empty_latents_of_other_models_and_a_presets_own_size(tiny, tiny_prompt, sdxl, prompt):
    """EmptyLatentImage has four channels, whatever the model has."""
    drawn = one_step(tiny("flux"), tiny_prompt("flux", 5), zeros() | {"downscale_ratio_spacial": 8})
    assert drawn["samples"].shape == (1, 16, 8, 8) and "downscale_ratio_spacial" not in drawn
    assert one_step(sdxl, prompt, preset="SDXL-Turbo")["samples"].shape == (1, 4, 64, 64)
    kept = one_step(sdxl, prompt, zeros() | {"label": "mine"}, preset="SDXL-Turbo")
    assert kept["label"] == "mine"


def test_progress_and_interrupts(sdxl, prompt, monkeypatch):
    import comfy.model_management
    import latent_preview

    seen = []

    def watched(model, steps):
        def callback(step, x0, x, total_steps):
            seen.append((step, total_steps, x0, x))
            if len(seen) == stop_after:
                comfy.model_management.interrupt_current_processing()

        return callback

    monkeypatch.setattr(latent_preview, "prepare_callback", watched)
    stop_after = 0
    drawn = one_step(sdxl, prompt, zeros(), preset="DMD2 SDXL, 4 steps")["samples"]
    assert [each[:2] for each in seen] == [(step, 4) for step in range(4)]
    torch.testing.assert_close(sdxl.model.process_latent_out(seen[-1][2]), drawn)
    stop_after = 6
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        one_step(sdxl, prompt, zeros(), preset="DMD2 SDXL, 4 steps")
    assert len(seen) == 6, "it stops before the next evaluation"
    assert torch.equal(one_step(sdxl, prompt, zeros(), preset="DMD2 SDXL, 4 steps")["samples"], drawn)


def test_previews_of_every_step(sdxl, prompt, monkeypatch):
    """Pictures, as other samplers send them."""
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    sent = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda *given, **named: sent.append(given))
    try:
        one_step(sdxl, prompt, zeros(), preset="DMD2 SDXL, 4 steps")
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    pictures = [(value, total, preview[1].size) for value, total, preview, *_ in sent if preview]
    assert pictures == [(step, 4, (8, 8)) for step in range(1, 5)]


def test_large_latents_and_decoding_in_tiles(embedded):
    """A picture larger than the model's own, and its decoding tile by tile beside that of the whole."""
    import nodes

    with torch.inference_mode():
        prompt = embedded.clip.encode_from_tokens_scheduled(embedded.clip.tokenize("a circle"))
        side = embedded.vae.spacial_compression_decode()
        drawn = one_step(embedded.model, prompt, levels="0.9", width=32 * side, height=24 * side)
        (whole,) = nodes.VAEDecode().decode(embedded.vae, drawn)
        (tiled,) = nodes.VAEDecodeTiled().decode(embedded.vae, drawn, 16 * side, overlap=4 * side)
    assert drawn["samples"].shape[-2:] == (24, 32) and bool(drawn["samples"].isfinite().all())
    assert tiled.shape == whole.shape == (1, 24 * side, 32 * side, 3)
    assert (tiled - whole).abs().mean() < 0.05 * whole.std()


def test_a_model_that_is_asked_tile_after_tile(tiny, tiny_prompt):
    """As nodes for large pictures do: each tile is drawn as it would be alone from its part of the noise."""
    import comfy.sample

    model, prompt, seen = tiny("sd21"), tiny_prompt("sd21", 5), []

    def in_tiles(apply_model, given):
        tiles = given["input"].split(8, -1)
        seen.extend(tile.shape for tile in tiles)
        return torch.cat([apply_model(tile, given["timestep"], **given["c"]) for tile in tiles], -1)

    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(in_tiles)
    latent = {"samples": torch.zeros(1, 4, 8, 16)}
    drawn = one_step(tiled, prompt, latent, levels="399")["samples"]
    assert len(seen) == 2
    noise = comfy.sample.prepare_noise(latent["samples"], 3)
    for part in (slice(0, 8), slice(8, 16)):
        alone = stock_of_noise(model, prompt, noise[..., part], levels="399")
        torch.testing.assert_close(drawn[..., part], alone, rtol=1e-4, atol=1e-4)


def stock_of_noise(model, prompt, noise, **widgets):
    """What a CFGGuider draws of noise with the parts."""
    import comfy.samplers

    sampler, sigmas, _ = parts(model, **widgets)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt})
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)


def test_masks_of_other_nodes_are_theirs(sdxl, prompt):
    """DifferentialDiffusion decides at each step what of a soft mask is drawn: at the first, what is above 0."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model = DifferentialDiffusion.execute(sdxl).args[0]
    given, mask = torch.randn(1, 4, 8, 8), torch.zeros(1, 8, 8)
    mask[..., 4:] = 0.5
    latent = {"samples": given, "noise_mask": mask}
    drawn = one_step(model, prompt, latent, preset="DMD2 SDXL, 1 step")["samples"]
    soft = one_step(sdxl, prompt, latent, preset="DMD2 SDXL, 1 step")["samples"]
    torch.testing.assert_close(drawn[..., :4], given[..., :4], rtol=1e-5, atol=1e-5)
    assert relative(drawn, soft) > 0.01


def test_it_leaves_nothing_behind(sdxl, prompt):
    before = {name: tensor.clone() for name, tensor in sdxl.model.state_dict().items()}
    latent = zeros()
    one_step(sdxl, prompt, latent, preset="SDXL-Turbo")
    assert all(torch.equal(tensor, before[name]) for name, tensor in sdxl.model.state_dict().items())
    assert latent.keys() == {"samples"} and not latent["samples"].any()


class Wrong:
    """What is refused, with a part of the message."""

    WIDGETS = (
        ({"preset": "SD-Turbo"}, "SD-Turbo is sd21, and this model is SDXL. Presets for it: SDXL-Turbo, DMD2"),
        ({"preset": "FLUX.1-schnell"}, "is flux, and this model is SDXL"),
        ({"preset": "SDXL-Lightning, 1 step"}, "predicts x0, and this model is set to eps.*ModelSamplingDiscrete"),
        ({"preset": "DMD2 SDXL, 4 steps", "steps": 3}, "in 3 steps: it was made for 4"),
        ({"preset": "SDXL-Turbo", "levels": "999"}, "levels are stated, and SDXL-Turbo has its own"),
        ({"levels": "999, 499", "steps": 3}, "2 levels are stated for 3 steps"),
        ({"levels": "ninety"}, "expected numbers, for example 999"),
        ({"levels": "nan"}, "NaN is no level"),
        ({"levels": "1200"}, r"time 1200 is not one of this model's levels: it has time 0 to 999, sigma 0.029"),
        ({"levels": "-5"}, "time -5 is not one of"),
        ({"levels": "20", "unit": "sigma"}, "sigma 20 is not one of"),
        ({"levels": "-6", "unit": "log_snr"}, "log_snr -6 is not one of.*log_snr -5.36 to 7.07"),
        ({"levels": "399, 999"}, "do not go from noise to data"),
        ({"levels": "399", "denoise": 0.001}, "denoise 0.001 leaves too little"),
        ({"levels": "399", "denoise": float("nan")}, "denoise is nan"),
    )


@pytest.mark.parametrize(("widgets", "message"), Wrong.WIDGETS)
def test_wrong_widgets(widgets, message, sdxl, prompt):
    for draw in (lambda: one_step(sdxl, prompt, zeros(), **widgets), lambda: parts(sdxl, **widgets)):
        with pytest.raises(ValueError, match=message):
            draw()


def test_wrong_inputs(sdxl, prompt, tiny_prompt):
    turbo, other = {"preset": "SDXL-Turbo"}, tiny_prompt("flux", 5)
    cases = (
        ({"latent": {"samples": torch.ones(1, 16, 8, 8)}}, "16 channels, this model's have 4.*own VAE"),
        ({"latent": {"samples": torch.full((1, 4, 8, 8), torch.nan)}}, "not finite"),
        ({"latent": {"samples": torch.ones(1, 4, 1, 8, 8)}}, r"shape \(1, 4, 1, 8, 8\): this model's have 4"),
        ({"width": 500, "height": 512}, "500x512: this model draws multiples of 8 pixels, such as 496x512"),
        ({"cfg": 3.0}, "there is no negative: link one, or set cfg to 1"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"cfg": 2.0, "negative": other}, "different text encoders.*16.*32"),
        ({"positive": []}, "positive conditioning is empty"),
        ({"positive": [[prompt[0][0] * torch.nan, prompt[0][1]]]}, "positive contains NaN"),
        ({"latent": {**zeros(), "noise_mask": torch.full((1, 8, 8), torch.nan)}}, "mask .* not finite"),
    )  # fmt: skip
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            one_step(**{"model": sdxl, "positive": prompt, **turbo, **changes})
    with pytest.raises(
        ValueError, match="positive is encoded 32 wide, this model takes 16: encode the prompt with the CLIP that"
    ):
        one_step(sdxl, other, zeros(), **turbo)
    with pytest.raises(ValueError, match="preset custom has no size: set width and height"):
        one_step(sdxl, prompt)


def test_wrong_models(tiny, tiny_prompt):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    with pytest.raises(ValueError, match=r"told a guidance scale, as FLUX.1-dev is"):
        parts(tiny("flux"), preset="FLUX.1-schnell")
    with pytest.raises(ValueError, match=r"this model is SD3. Presets for it: SD3.5-Turbo, custom"):
        parts(tiny("sd3"), preset="SDXL-Turbo")
    with pytest.raises(ValueError, match="Only custom fits it"):
        parts(tiny("qwen"), preset="SDXL-Turbo")
    with pytest.raises(ValueError, match="set to v: check that it is the right file"):
        parts(tiny("sd21-v"), preset="SD-Turbo")
    (blank,) = ModelSamplingDiscrete().patch(tiny("sdxl"), "eps", True)  # zero terminal SNR, and still noise
    with pytest.raises(ValueError, match=r"time 999 .* is pure noise"):
        parts(blank, preset="SDXL-Turbo")


def test_a_model_whose_input_is_a_picture(tiny):
    import comfy.model_sampling

    model = tiny("sdxl")

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.IMG_TO_IMG):
        pass

    model.add_object_patch("model_sampling", Sampling(model.model.model_config))
    with pytest.raises(ValueError, match=r"no mixture of data and noise.*IMG_TO_IMG"):
        parts(model, levels="399")


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.2, 0.5], r"the sigmas are \[1.2, 0.5\]: expected one or more that decrease, and then 0"),
        ([0.5, 1.2, 0.0], "that decrease"),
        ([0.0], "that decrease"),
        ([float("nan"), 0.0], "that decrease"),
        ([99.0, 0.0], "sigma 99 is not one of"),
    ],
)
def test_sigmas_of_other_nodes(sigmas, message, sdxl, prompt):
    sampler, _, _ = parts(sdxl, levels="399")
    with pytest.raises(ValueError, match=message):
        stock(sdxl, prompt, zeros()["samples"], sampler, torch.tensor(sigmas))


def test_noise_that_is_empty(sdxl, prompt):
    import comfy.samplers

    sampler, sigmas, _ = parts(sdxl, levels="399")
    guider = comfy.samplers.CFGGuider(sdxl)
    guider.inner_set_conds({"positive": prompt})
    with pytest.raises(ValueError, match="DisableNoise"):
        guider.sample(zeros()["samples"], zeros()["samples"], sampler, sigmas, disable_pbar=True)


def test_a_picture_that_is_not_seen_is_said(tiny, tiny_prompt, caplog):
    given = {"samples": torch.randn(1, 16, 8, 8)}
    one_step(tiny("flux-schnell"), tiny_prompt("flux-schnell", 5), given, preset="FLUX.1-schnell", steps=1)
    assert "hardly anything of the given picture is left" in caplog.text
    caplog.clear()
    one_step(tiny("flux-schnell"), tiny_prompt("flux-schnell", 5), given, preset="FLUX.1-schnell", denoise=0.5)
    assert not caplog.text


def test_the_first_noise_is_a_ksamplers(sdxl, prompt):
    with calls_of(sdxl) as calls:
        one_step(sdxl, prompt, zeros(2), levels="399", seed=11)
    assert relative(calls[0].x, noise_of(zeros(2)["samples"], 11)) < 1e-6
