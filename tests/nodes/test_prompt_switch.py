"""Prompts and scales that change with the noise level, against hand-written loops that change them."""

import math

import pytest
import torch

pytestmark = pytest.mark.comfy

FAMILIES = ("flux", "sd3", "sdxl", "sd15")
STEPS = 6


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Draw:
    """Pictures of a tiny model; ``choose(sigma)`` gives the prompts and the scale of a level, by hand."""

    def __init__(self, family, model, channels, prompt):
        import comfy.samplers

        self.model, self.family = model, family
        self.shape = (1, channels[family], 16, 16)
        self.prompts = [prompt(family, 5, seed) for seed in (1, 2, 3)]
        self.negative = prompt(family, 5, 9)
        sampling = model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)

    def __call__(self, positive, cfg=1.0, sampler="euler", choose=None, model=None):
        import comfy.samplers

        class ByHand(comfy.samplers.CFGGuider):
            def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (ComfyUI's signature)
                if choose is not None:
                    self.conds = {**self.conds, "positive": self.conds[choose(float(timestep[0]))]}
                return super().predict_noise(x, timestep, model_options, seed)

        guider = ByHand(model or self.model)
        if choose is None:
            guider.set_conds(positive, self.negative)
        else:
            named = {str(number): prompt for number, prompt in enumerate(self.prompts)}
            guider.inner_set_conds({"positive": self.prompts[0], "negative": self.negative, **named})
        guider.set_cfg(cfg)
        with torch.inference_mode():
            return guider.sample(
                random(*self.shape), torch.zeros(self.shape), comfy.samplers.sampler_object(sampler), self.sigmas,
                disable_pbar=True, seed=0,
            )  # fmt: skip


@pytest.fixture
def drawn(tiny, latent_channels, tiny_prompt):
    return lambda family: Draw(family, tiny(family), latent_channels, tiny_prompt)


def switch(draw, prompts, thresholds, unit="log_snr", preset="as given below", **options):
    from stylewright.nodes.prompt_switch import PromptSwitchByLogSNR

    names = ("first", "second", "third", "fourth")
    linked = dict(zip(names, prompts, strict=False))
    given = {"cross_fade": 0.0, **options}
    found = of_node(PromptSwitchByLogSNR).execute(
        model=draw.model, preset=preset, thresholds=thresholds, unit=unit, **linked, **given
    )
    return found.args


def of_node(node):
    """The node as a server runs it, without an id."""
    from types import SimpleNamespace

    return type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id=None)})


def log_snr(draw, sigma):
    from stylewright.nodes.bridge.noise_levels import levels_of

    return float(levels_of(draw.model.get_model_object("model_sampling")).log_snr(torch.tensor(sigma)))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_switch_equals_a_loop_that_changes_the_prompt(family, cfg, sampler, drawn):
    draw = drawn(family)
    first, second = (float(draw.sigmas[step]) for step in (2, 4))
    conditioning, info = switch(draw, draw.prompts, "0.333, 0.667", "share of steps", sigmas=draw.sigmas)
    expected = draw(None, cfg, sampler, lambda sigma: "0" if sigma > first else "1" if sigma > second else "2")
    assert torch.equal(draw(conditioning, cfg, sampler), expected)
    assert not torch.equal(expected, draw(draw.prompts[0], cfg, sampler)), "the switch has to be seen"
    assert "steps 1 to 2 of 6" in info and "steps 5 to 6 of 6" in info


@pytest.mark.parametrize("unit", ["log_snr", "sigma", "time"])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_say_the_same(family, unit, drawn):
    from stylewright.nodes.bridge.noise_levels import levels_of
    from stylewright.nodes.bridge.one_step_levels import time_of

    draw = drawn(family)
    sampling = draw.model.get_model_object("model_sampling")
    sigma = float(draw.sigmas[2:4].mean())
    value = {
        "log_snr": log_snr(draw, sigma),
        "sigma": sigma,
        "time": time_of(sampling, levels_of(sampling), sigma),
    }[unit]
    conditioning, _ = switch(draw, draw.prompts[:2], f"{value:.9g}", unit)
    expected = draw(None, choose=lambda each: "0" if each >= sigma else "1")
    assert torch.equal(draw(conditioning), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_every_level_exactly_one_acts(family, drawn):
    draw = drawn(family)
    sigma = float(draw.sigmas[3])
    conditioning, _ = switch(draw, draw.prompts[:2], f"{sigma:.9g}", "sigma")
    exact = torch.tensor(sigma)
    visited = [exact, *(torch.nextafter(exact, torch.tensor(end)) for end in (math.inf, 0.0)), *draw.sigmas[:-1]]
    for each in visited:
        acting = [number for number, (_, values) in enumerate(conditioning) if acts(values, each)]
        assert acting == [0 if each >= exact else 1]


def acts(values, sigma):
    """ComfyUI's own rule."""
    import comfy.samplers

    timestep, x = sigma[None], torch.zeros(1, 4, 8, 8)
    return comfy.samplers.get_area_and_mult({**values, "model_conds": {}, "uuid": None}, x, timestep) is not None


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_a_cross_fade_averages_predictions(family, known, drawn):
    """Weights in ComfyUI's own words: strengths at each level sum to 1 and follow the straight line."""
    draw = drawn(family)
    levels = [log_snr(draw, float(sigma)) for sigma in draw.sigmas[1:-1]]
    centre, edge = (levels[1] + levels[2]) / 2, 2.5 * abs(levels[2] - levels[1])
    sigmas = draw.sigmas if known else None
    conditioning, info = switch(draw, draw.prompts[:2], f"{centre:.6g}", cross_fade=edge, sigmas=sigmas)
    assert "cross-fade" in info
    for sigma, level in zip(draw.sigmas[1:-1], levels, strict=True):
        acting = [(entry[0], entry[1].get("strength", 1.0)) for entry in conditioning if acts(entry[1], sigma)]
        strengths = [sum(s for text, s in acting if text is prompt[0][0]) for prompt in draw.prompts[:2]]
        wanted = min(max((level - centre) / edge + 0.5, 0), 1)
        tolerance = 1e-5 if known else 1 / 32 + 1e-5
        assert strengths == pytest.approx([1 - wanted, wanted], abs=tolerance)
        assert sum(strengths) == pytest.approx(1)


def test_ranges_that_a_prompt_has_are_kept_and_a_gap_is_said(drawn, caplog):
    import nodes

    draw = drawn("flux")
    (early,) = nodes.ConditioningSetTimestepRange().set_range(draw.prompts[0], 0.0, 0.2)
    sigma = float(draw.sigmas[4])
    conditioning, info = switch(draw, [early, draw.prompts[1]], f"{sigma:.9g}", "sigma", sigmas=draw.sigmas)
    bound = float(draw.model.get_model_object("model_sampling").percent_to_sigma(0.2))
    assert bound > sigma and conditioning[0][1]["timestep_end"] == bound
    assert "start_percent" not in conditioning[0][1], "it would undo the range when sampling"
    assert "predicts zero" in info and "predicts zero" in caplog.text
    _, info = switch(draw, [early + draw.prompts[2], draw.prompts[1]], f"{sigma:.9g}", "sigma", sigmas=draw.sigmas)
    assert "predicts zero" not in info
    assert "start_percent" in early[0][1], "what came is not changed"


def test_a_range_that_begins_late_is_kept(drawn):
    import nodes

    draw = drawn("flux")
    (late,) = nodes.ConditioningSetTimestepRange().set_range(draw.prompts[1], 0.5, 1.0)
    conditioning, _ = switch(draw, [draw.prompts[0], late], "6")
    assert conditioning[1][1]["timestep_start"] < draw.model.get_model_object("model_sampling").percent_to_sigma(0.5)
    conditioning, _ = switch(draw, [draw.prompts[0], late], "-6")
    assert conditioning[1][1]["timestep_start"] == draw.model.get_model_object("model_sampling").percent_to_sigma(0.5)


def test_areas_masks_and_strengths_come_along(drawn):
    draw = drawn("flux")
    regional = [[draw.prompts[0][0][0], {**draw.prompts[0][0][1], "area": (8, 8, 0, 0), "strength": 0.7}]]
    conditioning, _ = switch(draw, [regional + draw.prompts[2], draw.prompts[1]], "-1")
    assert conditioning[0][1]["area"] == (8, 8, 0, 0) and conditioning[0][1]["strength"] == 0.7


def test_one_node_after_another_switches_twice(drawn):
    draw = drawn("flux")
    once, _ = switch(draw, draw.prompts[1:], "2")
    twice, _ = switch(draw, [draw.prompts[0], once], "-2")
    together, _ = switch(draw, draw.prompts, "-2, 2")
    assert torch.equal(draw(twice), draw(together))


def test_the_papers_thresholds_part_the_papers_steps(drawn):
    """FLUX at 1024x1024, 28 steps, shift 1.15: 3 % is one step and 10 % are three."""
    draw = drawn("flux")
    even = 1 - torch.arange(29) / 28
    sigmas = math.exp(1.15) * even / (1 + (math.exp(1.15) - 1) * even)
    for preset, steps in {
        "paper: after 3 % (-8.89)": "step 1 of 28",
        "paper: after 10 % (-6.52)": "steps 1 to 3 of 28",
    }.items():
        _, info = switch(draw, draw.prompts[:2], "0", preset=preset, sigmas=sigmas)
        assert steps in info
    small = {"samples": torch.zeros(1, 16, 64, 64)}
    _, info = switch(draw, draw.prompts[:2], "0", preset="paper: after 10 % (-6.52)", latent=small)
    assert "+1.39" in info
    with pytest.raises(ValueError, match="latent has no samples"):
        switch(draw, draw.prompts[:2], "0", preset="paper: after 10 % (-6.52)", latent={})


def test_a_patched_schedule_counts(drawn):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    draw = drawn("sdxl")
    with pytest.raises(ValueError, match=r"log_snr -6.52 is not one of this model's levels.*-5\.\d"):
        switch(draw, draw.prompts[:2], "-6.52")
    (draw.model,) = ModelSamplingDiscrete().patch(draw.model, "v_prediction", True)  # zero terminal SNR
    conditioning, _ = switch(draw, draw.prompts[:2], "-6.52")
    assert conditioning[0][1]["timestep_end"] == pytest.approx(math.exp(3.26), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"thresholds": ""}, "0 of them: expected 1"),
        ({"thresholds": "-3, -2"}, "expected 1"),
        ({"thresholds": "early"}, "expected numbers"),
        ({"thresholds": "nan"}, "finite"),
        ({"thresholds": "inf"}, "finite"),
        ({"thresholds": "2000", "unit": "time"}, "out of reach"),
        ({"thresholds": "-50"}, "the threshold -50"),
        (
            {"thresholds": "0.5", "unit": "share of steps", "sigmas": torch.tensor([14.0, 7.0, 2.0, 0.0])},
            "none of this",
        ),
        ({"thresholds": "0.5", "unit": "share of steps"}, "link sigmas"),
        ({"thresholds": "0.01", "unit": "share of steps", "sigmas": torch.tensor([1.0, 0.5, 0.0])}, "no step"),
        ({"sigmas": torch.tensor([0.0, 1.0])}, "increase"),
        ({"cross_fade": -1.0}, "cross-fade"),
    ],
)
def test_bad_thresholds_are_refused(change, words, drawn):
    draw = drawn("flux")
    given = {"thresholds": "-2", "unit": "log_snr", **change}
    with pytest.raises(ValueError, match=words):
        switch(draw, draw.prompts[:2], given.pop("thresholds"), given.pop("unit"), **given)


def test_bad_prompts_are_refused(drawn, tiny_prompt):
    draw = drawn("flux")
    with pytest.raises(ValueError, match="noisiest first"):
        switch(draw, draw.prompts, "2, -2")
    with pytest.raises(ValueError, match="third is not"):
        switch(draw, draw.prompts[:2], "-2, 1, 3", fourth=draw.prompts[2])
    with pytest.raises(ValueError, match="text encoders"):
        switch(draw, [draw.prompts[0], [[torch.zeros(1, 5, 3), {}]]], "-2")
    with pytest.raises(ValueError, match="NaN"):
        switch(draw, [draw.prompts[0], [[draw.prompts[1][0][0] * math.nan, {}]]], "-2")
    with pytest.raises(ValueError, match="pooled_output"):
        switch(draw, [draw.prompts[0], [[draw.prompts[1][0][0], {"pooled_output": torch.tensor([[math.nan]])}]]], "-2")
    with pytest.raises(ValueError, match="shape"):
        switch(draw, [draw.prompts[0], [[draw.prompts[1][0][0][:, :0], {}]]], "-2")
    with pytest.raises(ValueError, match="empty"):
        switch(draw, [[], draw.prompts[0]], "-2")
    with pytest.raises(ValueError, match="first is encoded 16 wide, this model takes 32"):
        switch(draw, [tiny_prompt("sdxl", 5), tiny_prompt("sdxl", 5)], "-2")
    pooled = [[draw.prompts[0][0][0], {"pooled_output": torch.zeros(1, 7)}]]
    with pytest.raises(ValueError, match="second is encoded 7 wide in its pooled output, this model takes 24"):
        switch(draw, [draw.prompts[0], pooled], "-2")


# --------------------------------------------------------------------------------------------------------------------
# Scales


def scaled(draw, scales, thresholds, unit="log_snr", **options):
    from stylewright.nodes.prompt_switch import CFGByLogSNR

    given = {"cross_fade": 0.0, **options}
    return of_node(CFGByLogSNR).execute(
        model=draw.model, scales=scales, thresholds=thresholds, unit=unit, **given
    ).args  # fmt: skip


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_scales_equal_a_loop_that_changes_them(family, drawn):
    import comfy.samplers

    draw = drawn(family)
    sigma = float(draw.sigmas[3])
    model, info = scaled(draw, "1, 3", "0.5", "share of steps", sigmas=draw.sigmas)
    assert "cfg 1" in info and "cfg 3" in info
    calls = []

    class ByHand(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (ComfyUI's signature)
            self.cfg = 1.0 if float(timestep[0]) > sigma else 3.0
            calls.append(self.cfg)
            return super().predict_noise(x, timestep, model_options, seed)

    guider = ByHand(draw.model)
    guider.set_conds(draw.prompts[0], draw.negative)
    with torch.inference_mode():
        expected = guider.sample(
            random(*draw.shape), torch.zeros(draw.shape), comfy.samplers.sampler_object("euler"), draw.sigmas,
            disable_pbar=True, seed=0,
        )  # fmt: skip
    assert calls == [1.0] * 3 + [3.0] * 3
    assert torch.equal(draw(draw.prompts[0], cfg=7.0, model=model), expected)
    assert torch.equal(draw(draw.prompts[0], cfg=7.0), draw(draw.prompts[0], cfg=7.0, model=draw.model))


def test_a_guider_has_its_own_scale_again(drawn):
    """After a call, and after one that fails."""
    from types import SimpleNamespace

    from comfy.patcher_extension import WrappersMP

    draw = drawn("flux")
    model, _ = scaled(draw, "1, 3", "-2")
    (wrapper,) = model.wrappers[WrappersMP.PREDICT_NOISE]["stylewright.cfg"]
    guider, seen = SimpleNamespace(cfg=7.0, conds={"negative": []}), []

    class Executor:
        class_obj = guider

        def __call__(self, x, timestep):
            seen.append(guider.cfg)
            if float(timestep[0]) < 0.1:
                raise RuntimeError("out of memory")

    wrapper(Executor(), None, torch.tensor([0.99]))
    assert seen == [1.0] and guider.cfg == 7.0
    with pytest.raises(RuntimeError):
        wrapper(Executor(), None, torch.tensor([0.05]))
    assert seen == [1.0, 3.0] and guider.cfg == 7.0


def test_a_guider_without_a_negative_prompt_is_named(drawn, caplog):
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    draw = drawn("flux")
    model, _ = scaled(draw, "1, 3", "-2")
    guider = Guider_Basic(model)
    guider.set_conds(draw.prompts[0])
    import comfy.samplers

    with torch.inference_mode():
        guider.sample(
            random(*draw.shape), torch.zeros(draw.shape), comfy.samplers.sampler_object("euler"), draw.sigmas,
            disable_pbar=True, seed=0,
        )  # fmt: skip
    assert "Guider_Basic" in caplog.text


@pytest.mark.parametrize(("scales", "words"), [("3", "two or more"), ("1, 2, 3", "expected 2"), ("1, x", "numbers")])
def test_bad_scales_are_refused(scales, words, drawn):
    with pytest.raises(ValueError, match=words):
        scaled(drawn("flux"), scales, "-2")
