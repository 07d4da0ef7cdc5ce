"""One-step sampling in ComfyUI: the network is fed unit noise at its time, and its answer is solved as in float64."""

import math

import pytest
import torch
from one_step_runs import calls_of, noise_of, one_step, parts, relative, stock
from tiny_models import TINY, is_known

pytestmark = pytest.mark.comfy

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
TABLES = {
    "sd15": (SCALED_LINEAR, "epsilon"), "sd21-v": (SCALED_LINEAR, "v_prediction"), "sdxl": (SCALED_LINEAR, "epsilon"),
    "sdxl-v": (SCALED_LINEAR | {"rescale_betas_zero_snr": True}, "v_prediction"), "pixart": (LINEAR, "epsilon"),
    "pixart-alpha": (LINEAR, "epsilon"),
}  # fmt: skip
EXACT = 1e-5


def empty(family, batch=1):
    tiny = TINY[family]
    side = 48 if family.startswith("pixart") else 8
    return {"samples": torch.zeros(batch, tiny.channels, side, side + 16 * (side > 8))}


def alphas_of(table):
    """alphas_cumprod in float64, from the betas that define them."""
    start, end, steps = table["beta_start"], table["beta_end"], 1000
    if table["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    alphas = torch.cumprod(1 - betas, 0)
    if table.get("rescale_betas_zero_snr"):
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    return alphas


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of tables of torch, inside diffusers
@pytest.mark.parametrize("time", [999, 800, 399, 60])
@pytest.mark.parametrize("family", TABLES)
def test_models_with_a_table(family, time, tiny, tiny_prompt):
    """Equal to the formula in float64, and to pred_original_sample of diffusers' schedulers."""
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    table, prediction = TABLES[family]
    if table.get("rescale_betas_zero_snr") and time == 999:
        pytest.skip("ComfyUI has 4.9e-8 for the zero at the end of this table, diffusers 0")
    model, latent = tiny(family), empty(family, 2)
    with calls_of(model) as calls:
        drawn = one_step(model, tiny_prompt(family, 5), latent, levels=str(time))
    (call,), z = calls, noise_of(latent["samples"])
    assert relative(call.x, z) < 1e-6 and call.time.tolist() == [time, time]
    pred = call.prediction[:, :4]  # PixArt's answers a variance, too

    alpha2 = alphas_of(table)[time]
    alpha, sigma = alpha2.sqrt(), (1 - alpha2).sqrt()
    formula = {
        "epsilon": (z.double() - sigma * pred.double()) / alpha,
        "v_prediction": alpha * z.double() - sigma * pred.double(),
    }[prediction]
    found = model.model.process_latent_in(drawn["samples"])
    assert relative(found, formula) < EXACT

    scheduler = DDPMScheduler(**table, prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(1000)
    diffusers = scheduler.step(pred, time, z, generator=torch.Generator()).pred_original_sample
    assert relative(found, diffusers) < EXACT
    euler = EulerDiscreteScheduler(**table, prediction_type=prediction, timestep_spacing="trailing")
    euler.set_timesteps(1000)
    ve = z * (euler.sigmas[999 - time] ** 2 + 1).sqrt()
    assert relative(found, euler.step(pred, euler.timesteps[999 - time], ve).pred_original_sample) < EXACT


@pytest.mark.parametrize("sigma", [1.0, 0.75, 0.25])
@pytest.mark.parametrize("family", ["flux", "flux-schnell", "sd3"])
def test_flows(family, sigma, tiny, tiny_prompt):
    """x0 = z - sigma f(z, sigma), which is also Euler's step to 0 in diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, latent = tiny(family), empty(family, 2)
    with calls_of(model) as calls:
        drawn = one_step(model, tiny_prompt(family, 5), latent, levels=str(sigma), unit="sigma")
    (call,), z = calls, noise_of(latent["samples"])
    assert torch.equal(call.x, z)
    told = 1000 * sigma if family == "sd3" else sigma
    assert call.time.tolist() == pytest.approx([told, told])
    found = model.model.process_latent_in(drawn["samples"])
    assert relative(found, z.double() - sigma * call.prediction.double()) < EXACT
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[sigma])
    assert relative(found, scheduler.step(call.prediction, scheduler.timesteps[0], z).prev_sample) < EXACT


@pytest.mark.parametrize("level", [-3.0, 0.5])
@pytest.mark.parametrize("family", ["sdxl-edm", "cosmos-predict2", "cogvideox", "hidream-o1", "qwen", "wan21"])
def test_the_network_sees_unit_noise_in_every_way_of_counting(family, level, tiny, tiny_prompt):
    """Data of another spread, sigmas that are no time, variance preserving x, louder noise, films."""
    if not is_known(family):
        pytest.skip("a family that this ComfyUI does not know")
    model, prompt = tiny(family), tiny_prompt(family, 5)
    size = {"width": 256, "height": 256}
    with calls_of(model) as calls:
        drawn = one_step(model, prompt, levels=str(level), unit="log_snr", **size)
    (call,), z = calls, noise_of(drawn["samples"])
    fed = call.x[:, : z.shape[1]]
    if family == "hidream-o1":  # noise of 8 beside data of 1: x is in ComfyUI's scale where the network sees it
        sigma = 1 / (1 + 8 * math.exp(level / 2))  # of the flow, at which 8 sigma / (1 - sigma) is the noise to data
        z = z * (1 + 7 * sigma)
    assert relative(fed, z) < 1e-5
    assert torch.isfinite(drawn["samples"]).all()


def test_data_of_another_spread(tiny, tiny_prompt):
    """Playground 2.5's: sigma_data is 0.5, and the network answers -v (arXiv 2206.00364, Eq. 7)."""
    model, prompt, level = tiny("sdxl-edm"), tiny_prompt("sdxl-edm", 5), -1.0
    alpha, sigma = (torch.sigmoid(torch.tensor(sign * level, dtype=torch.float64)).sqrt() for sign in (1, -1))
    given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    z, start = noise_of(given), {"levels": str(level), "unit": "log_snr"}
    for samples in (torch.zeros_like(given), given):
        with calls_of(model) as calls:
            drawn = one_step(model, prompt, {"samples": samples}, **start)["samples"]
        x_t = z if not samples.any() else alpha * model.model.process_latent_in(given) / 0.5 + sigma * z
        assert relative(calls[0].x, x_t) < EXACT
        x0 = alpha * x_t + sigma * calls[0].prediction
        assert relative(model.model.process_latent_in(drawn), 0.5 * x0) < EXACT


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart"])
def test_the_stock_sampler_is_wrong_before_the_last_time(family, tiny, tiny_prompt):
    """It feeds sigma / sqrt(1 + sigma^2) of the noise; at the last time it is right, and ours is the same."""
    model, latent, prompt = tiny(family), empty(family), tiny_prompt(family, 5)
    for time, right in ((399, False), (999, True)):
        _, sigmas, _ = parts(model, levels=str(time))
        with calls_of(model) as calls:
            ours = one_step(model, prompt, latent, levels=str(time))["samples"]
            theirs = stock(model, prompt, latent["samples"], "euler", sigmas)
        spread = float(calls[1].x.std() / calls[0].x.std())
        if right:
            assert relative(theirs, ours) < EXACT and spread == pytest.approx(1, abs=1e-5)
        else:
            alpha2 = alphas_of(TABLES[family][0])[time].item()
            assert spread == pytest.approx((1 - alpha2) ** 0.5, abs=1e-4) and spread < 0.95
            assert relative(theirs, ours) > 0.05


@pytest.mark.parametrize(
    ("preset", "steps", "stock_sampler"),
    [("DMD2 SDXL, 4 steps", 0, "sample_lcm"), ("SDXL-Turbo", 4, "sample_euler_ancestral")],
)
def test_a_few_steps_are_stock_samplers_with_our_noise(preset, steps, stock_sampler, tiny, tiny_prompt):
    """From the last time, where the stock sampler begins right."""
    import comfy.k_diffusion.sampling
    import comfy.samplers

    from stylewright.training.one_step import fresh_noise

    model, latent, prompt = tiny("sdxl"), empty("sdxl", 2), tiny_prompt("sdxl", 5)
    sampler, sigmas, text = parts(model, preset=preset, steps=steps)
    assert "freshly" in text and len(sigmas) == 5
    z, draws = noise_of(latent["samples"]), iter((1, 2, 3))

    def theirs(*args, **kwargs):
        noise = {"noise_sampler": lambda *_: fresh_noise(z, 3, next(draws))}
        return getattr(comfy.k_diffusion.sampling, stock_sampler)(*args, **kwargs, **noise)

    expected = stock(model, prompt, latent["samples"], comfy.samplers.KSAMPLER(theirs), sigmas)
    assert relative(stock(model, prompt, latent["samples"], sampler, sigmas), expected) < EXACT


def test_turbo_models_have_the_levels_of_their_own_scheduler(tiny):
    from comfy_extras.nodes_custom_sampler import SDTurboScheduler

    model = tiny("sdxl")
    for steps in (1, 2, 4):
        theirs = SDTurboScheduler.execute(model, steps, 1.0).args[0]
        torch.testing.assert_close(parts(model, preset="SDXL-Turbo", steps=steps)[1], theirs)


@pytest.mark.parametrize(
    ("family", "preset"), [("sdxl", "SDXL-Lightning, 2 to 8 steps"), ("flux-schnell", "FLUX.1-schnell")]
)
def test_models_distilled_along_a_path_are_euler(family, preset, tiny, tiny_prompt):
    import comfy.samplers

    model, latent, prompt = tiny(family), empty(family), tiny_prompt(family, 5)
    _, sigmas, _ = parts(model, preset=preset)
    simple = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    torch.testing.assert_close(sigmas, simple, rtol=1e-6, atol=1e-6)
    ours = one_step(model, prompt, latent, preset=preset)["samples"]
    assert relative(stock(model, prompt, latent["samples"], "euler", simple), ours) < EXACT


def test_from_a_given_picture_the_process_makes_the_input(tiny, tiny_prompt):
    import comfy.sample

    model, prompt = tiny("sdxl"), tiny_prompt("sdxl", 5)
    given = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    for denoise, time in ((1.0, 799), (0.5, 399), (0.25, 199)):
        with calls_of(model) as calls:
            one_step(model, prompt, {"samples": given}, levels="799", denoise=denoise)
        alpha2 = alphas_of(SCALED_LINEAR)[time]
        x_t = alpha2.sqrt() * model.model.process_latent_in(given) + (1 - alpha2).sqrt() * noise_of(given)
        assert relative(calls[0].x, x_t) < EXACT and calls[0].time.tolist() == [time, time]
    # SiD-LSG's generators learned from what the process makes of nothing.
    with calls_of(model) as calls:
        one_step(model, prompt, {"samples": torch.zeros_like(given)}, levels="399", start="sigma x noise")
    sigma = (1 - alphas_of(SCALED_LINEAR)[399]).sqrt()
    assert relative(calls[0].x, sigma * comfy.sample.prepare_noise(given, 3)) < EXACT


@pytest.mark.parametrize("family", ["sdxl", "flux", "cogvideox"])
def test_masks(family, tiny, tiny_prompt):
    """What is not masked stays, and is seen noised; what is masked begins as pure noise, or at denoise from both."""
    if not is_known(family):
        pytest.skip("a family that this ComfyUI does not know")
    model, prompt = tiny(family), tiny_prompt(family, 5)
    film = family == "cogvideox"
    given = torch.randn(1, TINY[family].channels, *([1] if film else []), 8, 8)
    mask = torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    latent, level = {"samples": given, "noise_mask": mask}, -1.0
    alpha, sigma = (torch.sigmoid(torch.tensor(sign * level)).sqrt() for sign in (1, -1))
    if family == "flux":
        alpha, sigma = (torch.sigmoid(torch.tensor(sign * level / 2)) for sign in (1, -1))
    known = alpha * model.model.process_latent_in(given) + sigma * noise_of(given)
    for anew in (True, False):
        sampler, sigmas, _ = parts(model, levels=str(level), unit="log_snr")
        sampler.anew = anew
        with calls_of(model) as calls:
            drawn = stock_masked(model, prompt, latent, sampler, sigmas)
        fed = calls[0].x[:, : given.shape[1]]
        assert relative(fed[..., :4], known[..., :4]) < EXACT
        assert relative(fed[..., 4:], (noise_of(given) if anew else known)[..., 4:]) < EXACT
        torch.testing.assert_close(drawn[..., :4], given[..., :4], rtol=1e-5, atol=1e-5)
        assert relative(drawn[..., 4:], given[..., 4:]) > 0.1


def stock_masked(model, prompt, latent, sampler, sigmas):
    import comfy.sample

    noise = noise_of(latent["samples"])
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, prompt, prompt, latent["samples"], noise_mask=latent["noise_mask"],
            disable_pbar=True, seed=3,
        )  # fmt: skip


def test_half_precision_is_no_excuse_where_a_rounding_counts_157_times(tiny, tiny_prompt):
    model, whole, prompt = tiny("pixart", torch.bfloat16), tiny("pixart", torch.bfloat16), tiny_prompt("pixart", 5)
    whole.model.diffusion_model.float()
    whole.model.manual_cast_dtype = torch.float32
    latent = empty("pixart")
    expected = one_step(whole, prompt, latent, levels="999")["samples"]
    found = one_step(model, prompt, latent, levels="999")["samples"]
    sampler, sigmas, text = parts(model, levels="999")
    plain = stock(model, prompt, latent["samples"], sampler, sigmas)
    assert relative(found, expected) < 1e-4 < relative(plain, expected)
    assert "157 times" in text and "fp32" in text
    assert "times" not in parts(tiny("sd15", torch.bfloat16), levels="999")[2]
