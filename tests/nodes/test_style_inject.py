"""StyleInject through the loader: what training computes, by hooks, beside whatever else is on a model."""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from tiny_models import TINY

pytestmark = pytest.mark.comfy

FAMILIES = ("flux", "sdxl", "sd3", "sd15")
CONVOLUTIONS = {"sdxl": (r"in_layers\.2", "op"), "sd15": (r"in_layers\.2", "op", "skip_connection")}
LEVELS = (-4.0, -1.0, 2.0)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def config(family="flux", targets=None, **options):
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.adapters.targets import target_patterns

    patterns = targets or (*target_patterns(family, "style"), *CONVOLUTIONS.get(family, ()))
    return AdapterConfig("styleinject", rank=3, alpha=6.0, branches=3, targets=patterns, **options)


@contextmanager
def trained(model, settings, family, seed=0, size=1.0):
    """The adapter on the model as training has it, of random numbers."""
    from stylewright.training.adapters.attach import attached

    with attached(model.model.diffusion_model, settings, family=family, seed=seed) as adapter:
        state = adapter.state_dict()
        adapter.load_state_dict(
            {n: t + size * random(*t.shape, seed=seed + i) for i, (n, t) in enumerate(state.items())}
        )
        yield adapter


def stored(model, settings, family, path, seed=0, size=1.0):
    """The file of such an adapter, opened."""
    from stylewright.nodes.bridge.adapters import read_tensors
    from stylewright.nodes.bridge.families import unet_layers
    from stylewright.training.formats.adapters import save_adapter
    from stylewright.training.formats.metadata import AdapterMetadata, build_metadata

    with trained(model, settings, family, seed, size) as adapter:
        about = AdapterMetadata(
            family, settings.method, settings.rank, settings.alpha, options=settings.options,
            unet_layers=unet_layers(model),
        )  # fmt: skip
        save_adapter(path, adapter.state_dict(), build_metadata(about))
    return read_tensors(path)


def applied(model, lora, strength=1.0, window=None, groups=None, warn=pytest.fail):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter

    with torch.inference_mode():
        return apply_adapter(model, None, lora, Strengths(strength, groups=groups or {}, window=window), warn=warn)


def apply(*args, **options):
    return applied(*args, **options).model


class Draw:
    """Draws with a tiny model of a family; the same noise and prompts every time."""

    def __init__(self, family, conditioning, tokens=5):
        self.shape = (1, TINY[family].channels, 16, 16)
        self.positive, self.negative = conditioning(family, tokens, 1), conditioning(family, tokens + 2, 2)
        self.flow = family in ("flux", "sd3")

    def __call__(self, model, log_snrs=LEVELS, cfg=1.0):
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(cfg)
        sigmas = [1 / (1 + math.exp(s / 2)) if self.flow else math.exp(-s / 2) for s in log_snrs]
        with torch.inference_mode():
            return guider.sample(
                random(*self.shape), torch.zeros(self.shape), comfy.samplers.sampler_object("euler"),
                torch.tensor([*sigmas, 0.0]), disable_pbar=True, seed=0,
            )  # fmt: skip


def close(found, expected, base, tolerance=1e-3):
    """Equal, measured by what the adapter changes."""
    change = (expected - base).norm()
    assert change > 1e-2 * base.norm(), "the adapter has to be seen"
    assert (found - expected).norm() < tolerance * change


def by_hand(a, b, router, bias):
    """A hook that writes the formulas out, for linear layers and the default form."""

    def hook(layer, args, h):
        if h.ndim == 2:
            return None
        x = args[0]
        s = (x.mean(1) @ router.T + bias).softmax(-1)
        delta = sum(s[:, i, None, None] * (x @ a[i].T) for i in range(len(a))) @ b.T
        mean, std = h.mean(1, keepdim=True), (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        y = (std + delta) * (h - mean) / std
        return mean + y - y.mean(1, keepdim=True)

    return hook


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loader_gives_what_training_computes(family, cfg, tiny, tiny_prompt, tmp_path):
    model, draw, settings = tiny(family), Draw(family, tiny_prompt), config(family)
    base = draw(model, cfg=cfg)
    lora = stored(model, settings, family, tmp_path / "a.safetensors")
    with trained(model, settings, family):
        expected = draw(model, cfg=cfg)
    found = applied(model, lora)
    assert found.homeless == found.missized == () and found.layers == len(lora.file.layers) > 5
    close(draw(found.model, cfg=cfg), expected, base)
    assert torch.equal(draw(model, cfg=cfg), base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


@pytest.mark.parametrize("injection", ["f1", "f2", "lora"])
def test_every_form_comes_through_a_file(injection, tiny, tiny_prompt, tmp_path):
    model, draw, settings = tiny("sd15"), Draw("sd15", tiny_prompt), config("sd15", injection=injection)
    lora = stored(model, settings, "sd15", tmp_path / "a.safetensors")
    with trained(model, settings, "sd15"):
        expected = draw(model)
    close(draw(apply(model, lora)), expected, draw(model))


def test_clips_first_token_is_left_alone_in_training_and_by_the_loader(tiny, tiny_prompt, tmp_path):
    model, draw = tiny("sd15"), Draw("sd15", tiny_prompt, tokens=77)
    settings = config("sd15", targets=(r"attn2\.to_[kv]",))
    layer, rows = model.model.diffusion_model.get_submodule("middle_block.1.transformer_blocks.0.attn2.to_k"), []
    lora = stored(model, settings, "sd15", tmp_path / "a.safetensors")
    inside = apply(model, lora)
    with trained(model, settings, "sd15") as adapter:
        expected = draw(model)
        adapted = adapter.layer("middle_block.1.transformer_blocks.0.attn2.to_k")
        x = random(2, 77, 16)
        rows.append((adapted(x) - layer(x)).abs().amax(-1))
    assert (rows[0][:, 0] == 0).all() and (rows[0][:, 1:] > 0).all()
    close(draw(inside), expected, draw(model))


def test_it_stacks_with_itself_stock_adapters_and_windows(tiny, tiny_prompt, tmp_path):
    """Later ones act on what earlier ones leave, as they would if trained on top of them."""
    import comfy.sd

    from stylewright.training.windows import Window

    model, draw, settings = tiny("flux"), Draw("flux", tiny_prompt), config("flux")
    ours = [stored(model, settings, "flux", tmp_path / f"{seed}.safetensors", seed) for seed in (0, 70)]
    stock = {}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"):
        weight = model.model.diffusion_model.get_submodule(name).weight
        stock[f"diffusion_model.{name}.lora_down.weight"] = random(3, weight.shape[1])
        stock[f"diffusion_model.{name}.lora_up.weight"] = random(len(weight), 3, seed=1)

    def stocked(model):
        return comfy.sd.load_lora_for_models(model, None, stock, 0.8, 0.0)[0]

    base = draw(model)
    both = draw(apply(apply(model, ours[0]), ours[1]), (-3.0,))
    with ExitStack() as stack:
        for lora in ours:
            for name, layer in lora.file.layers.items():
                hook = by_hand(*(layer.tensors[f"styleinject_{part}"] for part in "ABRr"))
                frozen = model.model.diffusion_model.get_submodule(name)
                stack.callback(frozen.register_forward_hook(hook).remove)
        close(both, draw(model, (-3.0,)), base)
    before, after = draw(stocked(apply(model, ours[0]))), draw(apply(stocked(model), ours[0]))
    close(before, after, draw(stocked(model)))
    high = Window(high=-2.0)
    inside = apply(model, ours[0], window=high, warn=str)
    assert torch.equal(draw(inside, (1.0,)), draw(model, (1.0,)))
    close(draw(inside, (-3.0,)), draw(apply(model, ours[0]), (-3.0,)), draw(model, (-3.0,)))
    assert torch.equal(draw(model), base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_strengths_by_group_and_nothing_at_all(tiny, tiny_prompt, tmp_path):
    model, draw, settings = tiny("flux"), Draw("flux", tiny_prompt), config("flux")
    lora = stored(model, settings, "flux", tmp_path / "a.safetensors")
    base = draw(model)
    assert torch.equal(draw(apply(model, lora, 0.0)), base)
    parts = [draw(apply(model, lora, groups={"image": image, "text": 0.0, "fused": 0.0})) for image in (0.0, 0.5, 1.0)]
    assert torch.equal(parts[0], base)
    assert 0 < (parts[1] - base).norm() < (parts[2] - base).norm()
    idle = applied(model, lora, groups={"modulation": 0.5})
    assert idle.idle == ("modulation",)


def test_files_of_diffusers_names_act_on_parts_of_fused_layers(tiny, tiny_prompt, tmp_path):
    """The statistics are of each channel, so that q, k and v of a fused layer are adapted as if they were alone."""
    model, draw = tiny("flux"), Draw("flux", tiny_prompt)
    settings = config("flux", targets=(r"double_blocks\.0\.img_attn\.qkv",))
    lora = stored(model, settings, "flux", tmp_path / "a.safetensors")
    from stylewright.nodes.bridge.adapters import AdapterTensors
    from stylewright.training.formats.contents import AdapterFile
    from stylewright.training.formats.layouts import to_diffusers

    file = lora.file
    parts = to_diffusers(file.layers, "flux")
    assert len(parts) == 3 and all("transformer_blocks.0.attn.to_" in name for name in parts)
    one = next(iter(parts))
    for layers in (parts, {one: parts[one]}):
        split = AdapterTensors(AdapterFile(file.path, file.header, file.about, layers, (), file.tensors))
        found = applied(model, split)
        assert found.homeless == ()
        drawn = draw(found.model)
        if len(layers) == 3:
            close(drawn, draw(apply(model, lora)), draw(model))
        else:
            assert not torch.equal(drawn, draw(model))


def renamed(lora, layers):
    """The same file with these layers."""
    from stylewright.nodes.bridge.adapters import AdapterTensors
    from stylewright.training.formats.contents import AdapterFile

    file = lora.file
    return AdapterTensors(AdapterFile(file.path, file.header, file.about, layers, (), file.tensors))


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_run_begins_with_a_file_of_diffusers_names(family, tiny, tmp_path):
    """Of layers that are one to one, and of parts that share their router, which are one adapter in a fused layer."""
    from stylewright.nodes.bridge.families import unet_layers
    from stylewright.nodes.bridge.starting import start_from
    from stylewright.training.formats.layouts import to_diffusers

    model = tiny(family)
    settings = config(family, targets=(r"attn\d?\.(qkv|to_[qv])",) if family == "sd15" else (r"img_attn\.qkv",))
    lora = stored(model, settings, family, tmp_path / "a.safetensors")
    layers = to_diffusers(lora.file.layers, family, unet_layers(model))
    assert layers.keys().isdisjoint(lora.file.layers)
    mine, theirs = start_from(model, lora, settings), start_from(model, renamed(lora, layers), settings)
    assert mine.state.keys() == theirs.state.keys()
    assert all(torch.equal(mine.state[name], theirs.state[name]) for name in mine.state)


def test_parts_that_decide_for_themselves_are_refused_with_what_to_do(tiny, tmp_path):
    from stylewright.nodes.bridge.starting import start_from
    from stylewright.training.formats.layouts import to_diffusers

    model, settings = tiny("flux"), config("flux", targets=(r"double_blocks\.0\.img_attn\.qkv",))
    lora = stored(model, settings, "flux", tmp_path / "a.safetensors")
    parts = to_diffusers(lora.file.layers, "flux")
    one = next(iter(parts))
    with pytest.raises(ValueError, match=r"a layer each, as in diffusers, .* with Load Style LoRA before this node"):
        start_from(model, renamed(lora, {one: parts[one]}), settings)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float8_e4m3fn])
def test_bases_in_low_precision(precision, tiny, tiny_prompt, tmp_path):
    model, draw, settings = tiny("flux", precision), Draw("flux", tiny_prompt), config("flux")
    model.set_model_compute_dtype(torch.float32)
    lora = stored(model, settings, "flux", tmp_path / "a.safetensors")
    base = draw(model)
    with trained(model, settings, "flux"):
        expected = draw(model)
    close(draw(apply(model, lora)), expected, base)
    assert torch.equal(draw(model), base)


def test_stock_loaders_load_nothing_of_it(tiny, tiny_prompt, tmp_path):
    import comfy.sd

    model, draw, settings = tiny("sdxl"), Draw("sdxl", tiny_prompt), config("sdxl")
    lora = stored(model, settings, "sdxl", tmp_path / "a.safetensors")
    stock = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)[0]
    assert not stock.patches
    assert torch.equal(draw(stock), draw(model))


def test_what_does_not_fit_is_said(tiny, tmp_path):
    model, settings = tiny("flux"), config("flux")
    lora = stored(model, settings, "flux", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is an adapter for the family 'flux', and this model is a"):
        applied(tiny("sd15"), lora)
    network = model.model.diffusion_model
    network.double_blocks[0].img_attn.qkv = torch.nn.Linear(64, 100)
    found = applied(model, lora)
    assert found.missized == ("diffusion_model.double_blocks.0.img_attn.qkv.weight",)
    del network.double_blocks[1]
    assert any(name.startswith("double_blocks.1.") for name in applied(model, lora).homeless)


@pytest.mark.parametrize("part", "ABRr")
def test_a_layer_with_a_tensor_missing_is_a_damaged_file(part, tiny, tmp_path):
    from safetensors.torch import save_file

    from stylewright.nodes.bridge.adapters import read_tensors

    model, path = tiny("flux"), tmp_path / "a.safetensors"
    lora = stored(model, config("flux"), "flux", path)
    broken = next(key for key in lora if key.endswith(f"styleinject_{part}"))
    save_file({key: tensor for key, tensor in lora.items() if key != broken}, path, dict(lora.file.header))
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged: of double_blocks\.\S+ one of the tensors"):
        applied(model, read_tensors(path))


def gradients(model, method, family, prompt, checkpoint, scale=0.3):
    """Of an adapter in training on top of whatever is on the model: what the model answers, and its gradients."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.gradients import differentiable

    settings = AdapterConfig(method, rank=3, targets="style" if method == "lora" else config(family).targets)
    ((text, rest),) = prompt
    with torch.inference_mode(), training_session(model):
        prompts = PromptTable(None, {"a": {**rest, "cross_attn": text}})
        denoiser = ComfyDenoiser(model, prompts)
        network = model.model.diffusion_model
        with attached(network, settings, family=family, seed=5) as adapter:
            for i, tensor in enumerate(adapter.parameters()):
                tensor.data += scale * random(*tensor.shape, seed=i)
            with differentiable(network, checkpoint=checkpoint):
                x = random(2, TINY[family].channels, 16, 16, seed=9)
                answer = denoiser(x, torch.tensor([-3.0, 1.0]), prompts.encode(["a", "a"]))
                answer.square().mean().backward()
            return answer.detach(), {n: p.grad for n, p in adapter._tensors.items()}, adapter.state_dict()


@pytest.mark.parametrize("windowed", [False, True], ids=["always", "window"])
@pytest.mark.parametrize(("family", "method"), [("flux", "lora"), ("sd15", "lora"), ("sd15", "styleinject")])
def test_training_on_top_of_it(family, method, windowed, tiny, tiny_prompt, tmp_path):
    """The gradients are those of the model with both, and blocks that are computed again see both."""
    from stylewright.training.windows import Window

    model, prompt = tiny(family), tiny_prompt(family, 5, 1)
    lora = stored(model, config(family), family, tmp_path / "a.safetensors", size=0.3)
    base = apply(model, lora, window=Window(-20.0, -1.0) if windowed else None)
    answer, plain, _ = gradients(base, method, family, prompt, checkpoint=False)
    again, recomputed, _ = gradients(base, method, family, prompt, checkpoint=True)
    without, alone, _ = gradients(model, method, family, prompt, checkpoint=True)
    assert torch.equal(answer, again)
    for name, gradient in plain.items():  # on SD1.5 rounding is another, with or without the adapter
        assert (gradient - recomputed[name]).norm() <= 1e-5 * gradient.norm()
    assert (answer[0] - without[0]).norm() > 1e-2 * without[0].norm()
    assert torch.equal(answer[1], without[1]) == windowed  # the second row's noise is outside of the window
    assert any(not torch.allclose(plain[name], alone[name]) for name in plain)


@pytest.mark.parametrize(("family", "method"), [("flux", "lora"), ("sd15", "lora"), ("sd15", "styleinject")])
def test_what_is_trained_on_top_of_it_is_loaded_on_top_of_it(family, method, tiny, tiny_prompt, tmp_path):
    from stylewright.nodes.bridge.adapters import read_tensors
    from stylewright.nodes.bridge.families import unet_layers
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.formats.adapters import save_adapter
    from stylewright.training.formats.metadata import AdapterMetadata, build_metadata

    model, draw = tiny(family), Draw(family, tiny_prompt)
    base = apply(model, stored(model, config(family), family, tmp_path / "a.safetensors", size=0.3))
    targets = "style" if method == "lora" else config(family).targets
    settings = AdapterConfig(method, rank=3, targets=targets)
    with attached(base.model.diffusion_model, settings, family=family, seed=5) as adapter:
        for i, tensor in enumerate(adapter.parameters()):
            tensor.data += 0.3 * random(*tensor.shape, seed=i)
        expected = draw(base)
        about = AdapterMetadata(family, method, 3, options=settings.options, unet_layers=unet_layers(model))
        save_adapter(tmp_path / "b.safetensors", adapter.state_dict(), build_metadata(about))
    both = apply(base, read_tensors(tmp_path / "b.safetensors"))
    close(draw(both), expected, draw(base))


def test_what_lies_below_tells_runs_apart(tiny, tmp_path):
    from stylewright.nodes.bridge.identity import what_acts

    model = tiny("flux")
    one, other = (stored(model, config("flux"), "flux", tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2))
    found = [what_acts(each) for each in (model, apply(model, one), apply(model, one), apply(model, other))]
    assert found[1] == found[2] and found[0] != found[1] != found[3]
    assert what_acts(apply(model, one, strength=0.5)) != found[1]


@pytest.mark.parametrize(("family", "apart"), [("sd15", False), ("flux", False), ("flux", True)])
def test_a_lora_in_its_place_loads_everywhere_and_says_what_is_lost(family, apart, tiny, tiny_prompt, tmp_path):
    import comfy.sd

    from stylewright.nodes.bridge.approximating import Scene, approximated
    from stylewright.nodes.bridge.sampling import Brush
    from stylewright.training.formats.layouts import to_diffusers

    model, draw, settings = tiny(family), Draw(family, tiny_prompt), config(family, injection="lora")
    lora = stored(model, settings, family, tmp_path / "a.safetensors", size=0.25)
    fused = len(lora.file.layers)
    if apart:  # queries, keys and values decide for themselves, as in diffusers: each its own router
        parts = to_diffusers(lora.file.layers, family)
        for number, (name, layer) in enumerate(parts.items()):
            router = layer.tensors["styleinject_R"]
            tensors = {**layer.tensors, "styleinject_R": router + random(*router.shape, seed=number)}
            parts[name] = replace(layer, tensors=tensors)
        lora = renamed(lora, parts)
    base = draw(model)
    with torch.inference_mode():
        scene = Scene(draw.positive, draw.negative, {"samples": torch.zeros(draw.shape)})
        made, summary = approximated(model, lora, scene, Brush(steps=3, cfg=2.0), rank=16)
    assert made.file.about.method == "lora" and "stylewright.mergeable" not in made.file.header
    assert made.file.header["stylewright.approximates"] == f"styleinject: {summary}"
    stock = comfy.sd.load_lora_for_models(model, None, dict(made), 1.0, 0.0)[0]
    assert len(stock.patches) == fused
    exact, near = draw(apply(model, lora)), draw(stock)
    assert (near - exact).norm() < 0.8 * (base - exact).norm()
    assert torch.equal(draw(model), base)
    with pytest.raises(ValueError, match="is a change of weights already"):
        approximated(model, made, scene, Brush(steps=1), rank=4)


def test_a_model_that_wears_the_adapter_is_no_base_to_fit_on(tiny, tiny_prompt, tmp_path):
    from stylewright.nodes.bridge.approximating import Scene, approximated
    from stylewright.nodes.bridge.sampling import Brush

    model, draw, settings = tiny("flux"), Draw("flux", tiny_prompt), config("flux")
    lora, other = (stored(model, settings, "flux", tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1))
    scene, brush = Scene(draw.positive, draw.negative, {"samples": torch.zeros(draw.shape)}), Brush(steps=1)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"has 0\.safetensors on it already, and is to be the one without it"):
            approximated(apply(model, lora, strength=0.5), lora, scene, brush, rank=4)
        approximated(apply(model, other), lora, scene, brush, rank=4)


@pytest.mark.parametrize("name", ["../../evil", "/tmp/x", "t/a:b*?"])
def test_a_file_name_is_checked_before_any_work(name, tiny, tmp_path, monkeypatch):
    from one_step_runs import hidden

    from stylewright.nodes.bridge import approximating
    from stylewright.nodes.lora_approximate import StyleInjectToLoRA
    from stylewright.nodes.lora_file_input import NO_FILE

    monkeypatch.setattr(approximating, "approximated", lambda *_: pytest.fail("it was fitted"))
    lora = stored(tiny("flux"), config("flux"), "flux", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="the file name"):
        hidden(StyleInjectToLoRA).execute(
            None, NO_FILE, [], [], {}, 4, 0, 1, 1.0, "euler", "simple", name, lora
        )  # fmt: skip
