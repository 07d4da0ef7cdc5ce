"""Adapters that act at some noise levels only: inside as patches of the weights, outside as if they were not there."""

import math

import pytest
import torch

pytestmark = pytest.mark.comfy

LAYERS = {
    "flux": ["double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1", "img_in"],
    "sd3": ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.context_block.attn.proj", "x_embedder.proj"],
    "sdxl": ["input_blocks.1.0.in_layers.2", "middle_block.1.transformer_blocks.1.attn2.to_k", "label_emb.0.0"],
    "sd15": ["input_blocks.1.0.in_layers.2", "input_blocks.2.0.op", "middle_block.1.transformer_blocks.0.attn1.to_q"],
    "pixart": ["blocks.0.attn.qkv", "blocks.1.cross_attn.kv_linear", "blocks.1.mlp.fc1"],
    "qwen": [f"transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.add_k_proj", "img_mlp.net.2")],
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def lora_of(model, names, rank=3):
    """A LoRA in ComfyUI's spelling, with an alpha, on linear layers and convolutions."""
    tensors = {}
    for seed, name in enumerate(names):
        weight = model.model.diffusion_model.get_submodule(name).weight
        tensors[f"diffusion_model.{name}.lora_down.weight"] = random(rank, *weight.shape[1:], seed=seed)
        ones = [1] * (weight.dim() - 2)
        tensors[f"diffusion_model.{name}.lora_up.weight"] = random(len(weight), rank, *ones, seed=seed + 50)
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(2.0)
    return tensors


def apply(model, lora, strength=1.0, window=None, groups=None, warn=lambda text: None):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, with_origin

    strengths = Strengths(model=strength, groups=groups or {}, window=window)
    with torch.inference_mode():
        return apply_adapter(model, None, with_origin(lora), strengths, warn=warn).model


def window(*ends, **options):
    from stylewright.training.windows import Window

    return Window(*ends, **options)


class Sampler:
    """Draws with a tiny model of a family; the same noise and prompts every time."""

    def __init__(self, family, conditioning, channels):
        side = 64 if family == "pixart" else 16
        self.shape = (1, channels[family], 1, side, side) if family == "qwen" else (1, channels[family], side, side)
        self.positive, self.negative = conditioning(family, 5, 1), conditioning(family, 5, 2)
        self.flow = family not in ("sd15", "sdxl", "pixart")

    def sigma(self, log_snr):
        return 1 / (1 + math.exp(log_snr / 2)) if self.flow else math.exp(-log_snr / 2)

    def __call__(self, model, log_snrs, cfg=1.0, sampler="euler"):
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(cfg)
        sigmas = torch.tensor([*map(self.sigma, log_snrs), 0.0])
        with torch.inference_mode():
            return guider.sample(
                random(*self.shape), torch.zeros(self.shape), comfy.samplers.sampler_object(sampler), sigmas,
                disable_pbar=True, seed=0,
            )  # fmt: skip


@pytest.fixture
def sampler(latent_channels, tiny_prompt):
    return lambda family: Sampler(family, tiny_prompt, latent_channels)


def close(found, expected, base):
    """Equal, measured by what the adapter changes."""
    change = (expected - base).norm()
    assert change > 1e-3 * base.norm(), "the adapter has to be seen"
    assert (found - expected).norm() < 1e-3 * change


@pytest.mark.parametrize(("family", "cfg"), [*((family, 1.0) for family in LAYERS), ("flux", 3.0), ("sdxl", 3.0)])
def test_a_full_window_is_the_plain_adapter_and_an_empty_one_the_base(family, cfg, tiny, sampler):
    model, draw = tiny(family), sampler(family)
    lora, levels = lora_of(model, LAYERS[family]), (-4.0, -1.0, 2.0)
    base = draw(model, levels, cfg)
    close(draw(apply(model, lora, 0.7, window()), levels, cfg), draw(apply(model, lora, 0.7), levels, cfg), base)
    assert torch.equal(draw(apply(model, lora, 0.7, window(5.0, 6.0)), levels, cfg), base)
    assert torch.equal(draw(model, levels, cfg), base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


@pytest.mark.parametrize(("family", "name"), [("flux", "euler"), ("sdxl", "euler"), ("flux", "heun")])
def test_the_noise_level_of_each_call_decides(family, name, tiny, sampler):
    """Noise above -2 in the window, and the rest of the steps outside of it."""
    model, draw = tiny(family), sampler(family)
    lora = lora_of(model, LAYERS[family])
    patched, inside = apply(model, lora), apply(model, lora, window=window(high=-2.0))
    for level in (-2.5, -1.5):
        base, found = draw(model, (level,), sampler=name), draw(inside, (level,), sampler=name)
        if level < -2:
            close(found, draw(patched, (level,), sampler=name), base)
        else:
            assert torch.equal(found, base)
    run = draw(inside, (-4.0, -1.0, 2.0), sampler=name)
    assert not torch.equal(run, draw(model, (-4.0, -1.0, 2.0), sampler=name))
    assert not torch.equal(run, draw(patched, (-4.0, -1.0, 2.0), sampler=name))


def adapters(model, name):
    """One adapter of every kind that ComfyUI loads, on one layer, by ComfyUI's names."""
    from stylewright.training.formats.layers import Layer
    from stylewright.training.formats.rotations import to_glora

    weight = model.model.diffusion_model.get_submodule(name).weight
    outputs, inputs = weight.shape[0], weight[0].numel()
    key = f"diffusion_model.{name}"
    lora = {"lora_down.weight": random(3, inputs), "lora_up.weight": random(outputs, 3, seed=1)}
    loha = {f"hada_w{i}_{side}": random(*((outputs, 3) if side == "a" else (3, inputs)), seed=ord(side) + i)
            for i in (1, 2) for side in "ab"}  # fmt: skip
    rotation = to_glora(Layer("oft", {"oft_R": random(inputs // 8, 28)}), outputs).tensors
    kinds = {
        "lora": lora,
        "dora": {**lora, "dora_scale": weight.flatten(1).norm(dim=1)[:, None] * (1 + random(outputs, 1))},
        "loha": {**loha, "alpha": torch.tensor(1.5)},
        "lokr": {"lokr_w1": random(4, 4), "lokr_w2": random(outputs // 4, inputs // 4, seed=1)},
        "lokr factored": {
            "lokr_w1": random(4, 4), "lokr_w2_a": random(outputs // 4, 2, seed=1),
            "lokr_w2_b": random(2, inputs // 4, seed=2), "alpha": torch.tensor(1.0),
        },
        "our oft": {f"{name}.weight": value for name, value in rotation.items()},
        "glora": {
            "a1.weight": random(inputs, 3), "a2.weight": random(3, inputs, seed=1),
            "b1.weight": random(outputs, 3, seed=2), "b2.weight": random(3, inputs, seed=3),
        },
        "oft": {"oft_blocks": random(outputs // 8, 8, 8)},
        "boft": {"oft_blocks": random(2, outputs // 8, 8, 8), "alpha": torch.tensor(0.0)},
        "difference": {"diff": random(*weight.shape), "diff_b": random(outputs, seed=1)},
    }  # fmt: skip
    return {kind: {f"{key}.{end}": tensor for end, tensor in tensors.items()} for kind, tensors in kinds.items()}


@pytest.mark.parametrize(
    "kind",
    ["lora", "dora", "loha", "lokr", "lokr factored", "our oft", "glora", "oft", "boft", "difference"],
)
@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear2"])
def test_every_kind_of_adapter_does_what_its_patch_does(kind, name, tiny, sampler):
    model, draw = tiny("flux"), sampler("flux")
    lora = adapters(model, name)[kind]
    base = draw(model, (-1.0,))
    close(draw(apply(model, lora, 0.6, window()), (-1.0,)), draw(apply(model, lora, 0.6), (-1.0,)), base)


@pytest.mark.parametrize("kind", ["lora", "core", "dora", "loha", "lokr"])
def test_every_kind_does_so_on_convolutions(kind, tiny, sampler):
    model, draw, name = tiny("sd15"), sampler("sd15"), "input_blocks.2.0.op"  # 3x3, with a stride
    weight = model.model.diffusion_model.get_submodule(name).weight
    n, m = weight.shape[:2]
    lora = {"lora_down.weight": random(3, m, 3, 3), "lora_up.weight": random(n, 3, 1, 1, seed=1)}
    tensors = {
        "lora": lora,
        "core": {
            "lora_down.weight": random(3, m, 1, 1), "lora_mid.weight": random(3, 3, 3, 3, seed=2),
            "lora_up.weight": random(n, 3, 1, 1, seed=1),
        },
        "dora": {**lora, "dora_scale": weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) * 1.3},
        "loha": {
            "hada_w1_a": random(n, 2), "hada_w1_b": random(2, m * 9, seed=1), "hada_w2_a": random(n, 2, seed=2),
            "hada_w2_b": random(2, m * 9, seed=3),
        },
        "lokr": {"lokr_w1": random(4, 4), "lokr_w2": random(n // 4, m // 4, 3, 3, seed=1)},
    }[kind]  # fmt: skip
    lora = {f"diffusion_model.{name}.{end}": tensor for end, tensor in tensors.items()}
    base = draw(model, (-1.0,))
    close(draw(apply(model, lora, 0.6, window()), (-1.0,)), draw(apply(model, lora, 0.6), (-1.0,)), base)


def test_parts_of_fused_layers(tiny, sampler):
    """Files of diffusers have q, k and v where FLUX has one layer; its last modulation has its halves swapped."""
    model, draw = tiny("flux"), sampler("flux")
    shapes = {
        "transformer_blocks.0.attn.to_k": (64, 64), "transformer_blocks.1.attn.add_v_proj": (64, 64),
        "single_transformer_blocks.0.proj_mlp": (256, 64), "norm_out.linear": (128, 64),
    }  # fmt: skip
    lora = {}
    for seed, (name, (outputs, inputs)) in enumerate(shapes.items()):
        lora[f"transformer.{name}.lora_A.weight"] = random(2, inputs, seed=seed)
        lora[f"transformer.{name}.lora_B.weight"] = random(outputs, 2, seed=seed + 9)
    patched = apply(model, lora)
    assert len(patched.patches) == 4
    base = draw(model, (-1.0,))
    close(draw(apply(model, lora, 1.0, window()), (-1.0,)), draw(patched, (-1.0,)), base)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float8_e4m3fn])
def test_bases_in_low_precision(precision, tiny, sampler):
    """The plain adapter of a float8 base is rounded to float8 with the weights; the other is not."""
    model, draw = tiny("flux", precision), sampler("flux")
    model.set_model_compute_dtype(torch.float32)
    lora = lora_of(model, LAYERS["flux"])
    base, found = draw(model, (-3.0,)), draw(apply(model, lora, window=window(high=-2.0)), (-3.0,))
    plain = draw(apply(model, lora), (-3.0,))
    assert (found - plain).norm() < 0.15 * (plain - base).norm()
    assert torch.equal(draw(apply(model, lora, window=window(high=-2.0)), (1.0,)), draw(model, (1.0,)))


def test_it_stacks_with_itself_and_with_stock_adapters_before_and_after(tiny, sampler):
    import comfy.sd

    model, draw = tiny("flux"), sampler("flux")
    ours, stock = lora_of(model, LAYERS["flux"][:3]), lora_of(model, LAYERS["flux"][1:])

    def stocked(model):
        return comfy.sd.load_lora_for_models(model, None, stock, 0.8, 0.0)[0]

    base = draw(model, (-3.0,))
    expected = draw(apply(apply(stocked(model), ours, 0.5), ours, 0.25), (-3.0,))
    part = window(high=-2.0)
    after = apply(apply(stocked(model), ours, 0.5, part), ours, 0.25, part)
    before = stocked(apply(apply(model, ours, 0.25, part), ours, 0.5, part))
    close(draw(after, (-3.0,)), expected, base)
    draw(before, (1.0,))  # loaded once, then cloned: a clone says that it is loaded, too
    close(draw(before.clone(), (-3.0,)), expected, base)
    assert torch.equal(draw(before, (1.0,)), draw(stocked(model), (1.0,)))
    assert torch.equal(draw(model, (-3.0,)), base)


@pytest.mark.parametrize("kinds", [("lora", "our oft"), ("our oft", "lora"), ("glora", "glora"), ("dora", "our oft")])
def test_those_that_change_inputs_stack_in_the_order_of_their_patches(kinds, tiny, sampler):
    model, draw = tiny("flux"), sampler("flux")
    first, second = (adapters(model, "double_blocks.0.img_attn.qkv")[kind] for kind in kinds)
    expected = draw(apply(apply(model, first, 0.6), second, 0.8), (-1.0,))
    found = draw(apply(apply(model, first, 0.6, window()), second, 0.8, window()), (-1.0,))
    close(found, expected, draw(model, (-1.0,)))


def answer(model, rows, **loading):
    """FLUX's x0 for these of three rows, at log_snr -7.8, -2 and 0, without a sampler around it."""
    from stylewright.nodes.bridge.denoiser import transformer_options

    x, context, y = random(3, 16, 8, 8), random(3, 4, 32, seed=1), random(3, 24, seed=2)
    sigma = torch.tensor([0.98, 1 / (1 + math.exp(-1.0)), 0.5])[rows]
    options = {**transformer_options(model), "cond_or_uncond": [0], "sigmas": sigma}
    with torch.inference_mode():
        model.load(torch.device("cpu"), full_load=not loading, **loading)
        assert model.model.model_lowvram == bool(loading)
        x0 = model.model.apply_model(
            x[rows], sigma, c_crossattn=context[rows], y=y[rows], guidance=torch.ones(len(rows)),
            transformer_options=options,
        )  # fmt: skip
        model.unpatch_model()
    return x0


def test_rows_of_a_batch_have_their_own_noise_levels(tiny):
    model = tiny("flux")
    inside = apply(model, lora_of(model, LAYERS["flux"]), window=window(high=-2.0, edge=2.0, outside=0.1))
    alone = torch.cat([answer(inside, [row]) for row in range(3)])
    torch.testing.assert_close(answer(inside, [0, 1, 2]), alone, rtol=1e-4, atol=1e-4)


def test_a_window_follows_model_sampling_patches_and_the_size_of_the_picture(tiny, sampler):
    """A model that another node makes a VE one of v-prediction keeps the meaning of log_snr."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model, draw = tiny("sdxl"), sampler("sdxl")
    lora = lora_of(model, LAYERS["sdxl"])
    inside = apply(model, lora, window=window(high=-2.0))
    changed, plain = (ModelSamplingDiscrete().patch(each, "v_prediction", True)[0] for each in (inside, model))
    assert torch.equal(draw(changed, (-1.9,)), draw(plain, (-1.9,)))
    assert not torch.equal(draw(changed, (-2.1,)), draw(plain, (-2.1,)))
    # 16x16 latents are 64 tokens of 2x2: a window for 256 tokens moves up by log 4 = 1.39.
    carried = apply(model, lora, window=window(high=-4.0, reference_tokens=256))
    assert torch.equal(draw(carried, (-2.5,)), draw(model, (-2.5,)))
    assert not torch.equal(draw(carried, (-2.7,)), draw(model, (-2.7,)))


def test_weights_are_offloaded_one_by_one(tiny):
    """What lowvram does: the base's own patches are applied as its layers run."""
    model = tiny("flux")
    lora = lora_of(model, LAYERS["flux"])
    base, expected = answer(model, [0]), answer(apply(apply(model, lora, 0.5), lora, 0.5), [0])
    inside = apply(apply(model, lora, 0.5), lora, 0.5, window(high=-2.0))
    close(answer(inside, [0], lowvram_model_memory=1), expected, base)


def test_the_user_is_told_when_nothing_can_happen(tiny, sampler):
    from stylewright.nodes.bridge.windowed import sentence
    from stylewright.training.windows import style_window

    model, draw, told = tiny("flux"), sampler("flux"), []
    lora = lora_of(model, LAYERS["flux"])
    inside = apply(model, lora, window=window(high=-2.0), warn=told.append)
    draw(inside, (-3.0, 0.0))
    assert not told
    draw(inside, (-1.0, 0.0))
    assert len(told) == 1 and "no step of the sampler is in the window" in told[0] and "from log_snr -1.00" in told[0]
    assert sentence(model, style_window(None)) == "acts at log_snr below -6.52"
    assert "acts nowhere: this model knows log_snr from -5.3" in sentence(tiny("sdxl"), style_window(None))


def test_what_cannot_act_so_is_refused(tiny):
    model, name = tiny("flux"), "txt_in"
    weight = model.model.diffusion_model.get_submodule(name).weight
    lora = {**lora_of(model, LAYERS["flux"]), f"diffusion_model.{name}.set_weight": random(*weight.shape)}
    with pytest.raises(ValueError, match=r"the weight of diffusion_model\.txt_in is replaced.*Set window to all"):
        apply(model, lora, window=window())
    assert len(apply(model, lora).patches) == 5
