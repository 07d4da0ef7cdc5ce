"""Negative prompts inside attention beside what other nodes put on a model, and what is left of them afterwards."""

import pytest
import torch
from negative_proof import CROSS, by_hand, draw, guidance, in_place, layers_of, sigmas_of, texts

pytestmark = pytest.mark.comfy

FAMILIES = ("sdxl", "pixart", "wan21", "cosmos-predict2", "ltxv")


@pytest.fixture
def prompts(tiny_prompt):
    """``prompts(family)``: a positive and a negative one, of different lengths."""
    return lambda family: (tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2))


def apply(*args, **kwargs):
    from stylewright.nodes.bridge.negative import apply

    return apply(*args, **kwargs)


def alike(found, expected, base):
    assert (expected - base).norm() > 1e-3 * base.norm()
    assert (found - expected).norm() < 1e-4 * (expected - base).norm()


def lora_patches(model, family):
    """A difference for every weight of the layers that attend to text."""
    names = {layer: name for name, layer in model.model.diffusion_model.named_modules()}
    generator = torch.Generator().manual_seed(4)
    return {
        f"diffusion_model.{names[layer]}.{name}": ("diff", (0.1 * torch.randn(weight.shape, generator=generator),))
        for layer in layers_of(model, family)
        for name, weight in layer.named_parameters()
        if weight.ndim == 2
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_before_and_after(family, tiny, prompts):
    """The negative prompt meets the weights as the adapter makes them, whichever node comes first."""
    model, (positive, negative) = tiny(family), prompts(family)
    merged = tiny(family)
    for name, (_, (difference,)) in lora_patches(model, family).items():
        merged.model.get_parameter(name).data += difference
    expected, plain = draw(apply(merged, negative, guidance("nag")), family, positive), draw(merged, family, positive)
    before, after = model.clone(), apply(model, negative, guidance("nag"))
    before.add_patches(lora_patches(model, family))
    after.add_patches(lora_patches(model, family))
    alike(draw(apply(before, negative, guidance("nag")), family, positive), expected, plain)
    alike(draw(after, family, positive), expected, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_patched_in_every_call(family, tiny, prompts, monkeypatch):
    """As with --lowvram: ComfyUI leaves the weights where they are, and patches them as layers run."""
    import comfy.model_management

    model, (positive, negative) = tiny(family), prompts(family)
    patched = apply(model, negative, guidance("nag"))
    patched.add_patches(lora_patches(model, family))
    plain, expected = draw(model, family, positive), draw(patched, family, positive)
    patched.detach()

    def load(models, **options):
        models[0].patch_model(torch.device("cpu"), lowvram_model_memory=1000)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    found = draw(patched, family, positive)
    assert patched.model.model_lowvram
    patched.detach()
    alike(found, expected, plain)


def of_an_image(q, k, v, options):
    """As an image adapter's: the attention to the text, and some to tokens of its own."""
    from comfy.ldm.modules.attention import optimized_attention

    heads, generator = options["n_heads"], torch.Generator().manual_seed(6)
    rows, parts = q.shape[0], options["cond_or_uncond"]
    image = torch.randn(1, 4, q.shape[-1], generator=generator).expand(rows, -1, -1)
    weights = torch.tensor([0.5 if part == 0 else 0.25 for part in parts]).repeat_interleave(rows // len(parts))
    of_text = optimized_attention(q, k, v, heads, attn_precision=options["attn_precision"])
    return of_text + weights[:, None, None] * optimized_attention(q, image, image, heads)


@pytest.mark.parametrize("method", ["nasa", "nag", "vsf"])
@pytest.mark.parametrize("place", [("middle", 0), ("middle", 0, 1)])
def test_an_image_adapter_before_and_after(place, method, tiny, prompts, tiny_prompt):
    """Its single slot is kept, under either kind of key, and its answer is the positive one."""
    model, (positive, negative) = tiny("sdxl"), prompts("sdxl")
    drawing = {"negative": tiny_prompt("sdxl", 5, 3), "cfg": 2.0, "batch": 2}
    adapter, after = model.clone(), apply(model, negative, guidance(method))
    for each in (adapter, after):
        each.set_model_attn2_replace(of_an_image, *place[:2], *place[2:])
    before = apply(adapter, negative, guidance(method))
    plain, found = draw(adapter, "sdxl", positive, **drawing), draw(after, "sdxl", positive, **drawing)
    assert torch.equal(found, draw(before, "sdxl", positive, **drawing))
    alone = draw(apply(model, negative, guidance(method)), "sdxl", positive, **drawing)
    assert min((found - other).norm() for other in (plain, alone)) > 1e-3 * plain.norm()
    # Where the adapter alone acts, and the negative nowhere else, Z+ is the adapter's.
    middle = range(2, 4)
    same = draw(apply(adapter, positive, guidance("nag"), layers=middle), "sdxl", positive, **drawing)
    assert (same - plain).norm() > 1e-4 * plain.norm(), "the adapter's answer was held against the text's alone"


def test_regional_prompts_that_lengthen_the_text(tiny, prompts):
    """Another pack's attn2_patch sees the text without the negative one, before us and after us."""
    model, (positive, negative) = tiny("sdxl"), prompts("sdxl")
    lengths = []

    def region(n, context, value, options):
        lengths.append(context.shape[1])
        return n, torch.cat([context, 2 * context], 1), torch.cat([value, 2 * value], 1)

    before, after = model.clone(), apply(model, negative, guidance("nag"))
    before.set_model_attn2_patch(region)
    after.set_model_attn2_patch(region)
    plain = draw(before, "sdxl", positive)
    found = draw(after, "sdxl", positive)
    assert torch.equal(found, draw(apply(before, negative, guidance("nag")), "sdxl", positive))
    assert set(lengths) == {5} and (found - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("family", ["wan21", "ltxv", "cosmos-predict2"])
def test_another_override_of_attention(family, tiny, prompts):
    model, (positive, negative) = tiny(family), prompts(family)
    calls = []

    def override(attention, *args, **kwargs):
        calls.append(args[1].shape[-2])
        return attention(*args, **kwargs)

    patched = apply(model, negative, guidance("nag"))
    expected = draw(patched, family, positive)
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(draw(patched, family, positive), expected)
    assert calls


@pytest.mark.parametrize("family", FAMILIES)
def test_clones_do_not_see_each_other(family, tiny, prompts, tiny_prompt):
    model, (positive, negative) = tiny(family), prompts(family)
    base, other = draw(model, family, positive), tiny_prompt(family, 3, 9)
    first, second = apply(model, negative, guidance("nag")), apply(model, other, guidance("nasa"))
    pictures = [draw(each, family, positive) for each in (first, second, first, model, second)]
    assert torch.equal(pictures[0], pictures[2]) and torch.equal(pictures[1], pictures[4])
    assert torch.equal(pictures[3], base) and not torch.equal(pictures[0], pictures[1])


@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "pixart"])
def test_two_on_one_model(family, tiny, prompts, tiny_prompt):
    """The second one's positive answer is what the first one makes of it: NASA twice subtracts both."""
    model, (positive, first), second = tiny(family), prompts(family), tiny_prompt(family, 3, 9)
    base, below = draw(model, family, positive), apply(model, first, guidance("nasa", 0.2))
    found = draw(apply(below, second, guidance("nasa", 0.2)), family, positive)
    both = draw(apply(model, [*first, *second], guidance("nasa", 0.4)), family, positive)  # averaged: 0.2 of each
    alike(found, both, base)


@pytest.mark.parametrize("family", ["sdxl", "wan21"])
def test_value_sign_flip_on_top_of_nasa(family, tiny, prompts, tiny_prompt):
    """One attention to the prompt and the second negative, and from it what the first negative says."""
    model, (positive, first), second = tiny(family), prompts(family), tiny_prompt(family, 3, 9)
    base = draw(model, family, positive)
    given_first, given_second = (texts(model, family, each) for each in (first, second))

    def forward(layer, own):
        def attend(x, context=None, *args, **kwargs):
            q, *pair, heads, out = CROSS[family][1](layer, x, context)
            _, *of_first, _, _ = CROSS[family][1](layer, x, given_first[layer])
            _, *of_second, _, _ = CROSS[family][1](layer, x, given_second[layer])
            first_alone = by_hand("nasa", q, of_first, of_first, heads, 0.0)
            return out((by_hand("vsf", q, pair, of_second, heads, 0.7) - 0.2 * first_alone).to(x))

        return attend

    with in_place(layers_of(model, family), forward):
        expected = draw(model, family, positive)
    below = apply(model, first, guidance("nasa", 0.2))
    alike(draw(apply(below, second, guidance("vsf", 0.7)), family, positive), expected, base)


@pytest.mark.parametrize("family", ["pixart", "flux"])
def test_two_at_one_noise_level_are_refused(family, tiny, prompts):
    model, (positive, negative) = tiny(family), prompts(family)
    both = apply(apply(model, negative, guidance("nag")), negative, guidance("nag"))
    with pytest.raises(ValueError, match=r"two negative prompts act .* at the same noise level.*Conditioning \(Comb"):
        draw(both, family, positive)


@pytest.mark.parametrize("family", ["sdxl", "pixart", "wan21", "ltxv", "flux", "lumina2", "hunyuan-video", "auraflow"])
def test_two_in_windows_of_their_own(family, tiny, prompts, tiny_prompt):
    """As one node whose negative prompts have these ranges of steps, whichever of the two nodes comes first."""
    from stylewright.nodes.bridge.noise_levels import noise_levels
    from stylewright.training.windows import Window

    model, (positive, first), second = tiny(family), prompts(family), tiny_prompt(family, 3, 9)
    sigmas, weights = sigmas_of(model), guidance("nag")
    middle = float(noise_levels(model).log_snr(torch.tensor(0.8 * sigmas[0])))
    early, late = Window(high=middle), Window(low=middle)
    ranged = [
        [[text, {**values, name: 0.8 * sigmas[0]}] for text, values in prompt]
        for prompt, name in ((first, "timestep_end"), (second, "timestep_start"))
    ]
    expected = draw(apply(model, [*ranged[0], *ranged[1]], weights), family, positive, sigmas=sigmas)
    orders = ((first, early), (second, late)), ((second, late), (first, early))
    for (one, its), (other, others) in orders:
        both = apply(apply(model, one, weights, its), other, weights, others)
        alike(draw(both, family, positive, sigmas=sigmas), expected, draw(model, family, positive, sigmas=sigmas))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_leaves_nothing(family, tiny, prompts):
    """A cancel is an exception, too: in a layer, and between the steps."""
    model, (positive, negative) = tiny(family), prompts(family)
    base, patched = draw(model, family, positive), apply(model, negative, guidance("nag"))
    expected = draw(patched, family, positive)
    layer = layers_of(model, family)[-1]

    def stop(*_):
        raise KeyboardInterrupt

    handle = projection_of(layer, "to_k", "kv_linear", "k", "k_proj").register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        draw(patched, family, positive)
    handle.remove()
    gate = patched.wrappers["apply_model"][next(iter(patched.wrappers["apply_model"]))][0].__self__
    assert gate._sampling is None and gate._inside.get() is False
    assert torch.equal(draw(patched, family, positive), expected)
    assert torch.equal(draw(model, family, positive), base)
    assert not [name for each in model.model.modules() for name in vars(each) if "stylewright" in name]


@pytest.mark.parametrize("family", CROSS)
def test_negative_keys_are_made_once_a_run(family, tiny, prompts):
    """And in every step where another function on the model may change the layers."""
    from comfy.patcher_extension import WrappersMP

    model, (positive, negative) = tiny(family), prompts(family)
    patched, lengths = apply(model, negative, guidance("nag")), []
    changing = patched.clone()
    changing.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "another", passed_on)
    layer = layers_of(model, family)[-1]
    projection = projection_of(layer, "to_k", "kv_linear", "k", "k_proj")

    def count(layer, args, output):
        lengths.append(args[0].numel() // args[0].shape[-1])

    handle = projection.register_forward_hook(count)
    try:
        expected = draw(patched, family, positive, sigmas=sigmas_of(patched))
        made, lengths[:] = list(lengths), []
        found = draw(changing, family, positive, sigmas=sigmas_of(patched))
    finally:
        handle.remove()
    assert made[0] == lengths[0] > made[1] == made[2] and len(set(lengths)) == 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def passed_on(executor, *args, **kwargs):
    return executor(*args, **kwargs)


def projection_of(layer, *names):
    found = next(layer._modules[name] for name in names if name in layer._modules)
    return found[0] if isinstance(found, torch.nn.Sequential) else found


def test_a_controlnet(tiny, prompts):
    """It has attention of its own, to the positive prompt, which is left alone."""
    import comfy.controlnet
    import comfy.ops
    from comfy.cldm.cldm import ControlNet
    from tiny_models import SD15

    model, (positive, negative) = tiny("sd15"), prompts("sd15")
    config = {name: value for name, value in SD15.items() if name not in ("out_channels", "transformer_depth_output")}
    network = ControlNet(**config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    generator, lengths = torch.Generator().manual_seed(3), []
    for weight in network.parameters():
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    for name, layer in network.named_modules():
        if name.endswith("attn2"):
            layer.register_forward_pre_hook(
                lambda *given: lengths.append(given[2]["context"].shape[1]), with_kwargs=True
            )
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)
    hint = torch.rand(1, 3, 64, 96, generator=generator)
    controlled = [[positive[0][0], {**positive[0][1], "control": control.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))}]]
    pictures = [
        draw(each, "sd15", prompt)
        for each in (model, apply(model, negative, guidance("nag")))
        for prompt in (positive, controlled)
    ]
    assert set(lengths) == {5}
    assert all((a - b).norm() > 1e-3 * a.norm() for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "wan21", "pixart"])
def test_compiled(family, tiny, prompts):
    """The node Torch Compile Model, before and after."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, (positive, negative) = tiny(family), prompts(family)
    base, patched = draw(model, family, positive), apply(model, negative, guidance("nag"))
    expected = draw(patched, family, positive)
    for each in (patched, model.clone()):
        set_torch_compile_wrapper(each, backend="eager")
        compiled = each if each is patched else apply(each, negative, guidance("nag"))
        torch._dynamo.reset()
        alike(draw(compiled, family, positive), expected, base)
