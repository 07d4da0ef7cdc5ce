"""Every form that weights are kept in: trained as they are, with right gradients and no second copy."""

import math

import pytest
import torch
from stored_models import CAST, QUANTISED, known_forms, stored
from stored_steps import copies, distance, gradients, reference, without_the_mechanism
from training_runs import memory, predict, predict_as_trained, three_steps

pytestmark = pytest.mark.comfy

FORMS = [*CAST, *QUANTISED]
COPYING = [form for form in FORMS if form not in ("float32", "bfloat16", "float16")]


@pytest.fixture
def dense(tiny):
    return tiny("flux")


def skip_unknown(form):
    if form not in known_forms():
        pytest.skip(f"this ComfyUI has no weights in {form}")


# What a step may be off by that is computed in a type of few digits, with eight bits and eleven.
ALLOWED = {"bfloat16": 0.03, "float8 in bfloat16": 0.03, "float16": 0.01}
# The forms that multiply in integers round a layer's inputs, too: to whole numbers of at most this size, after a
# rotation of so many neighbours. How far that carries through a network is the form's affair; what is ours is the way
# back, which is compared at the outputs that the form's layers give.
LARGEST = {"int8": (127, 1), "rotated int8": (127, 16), "w4a8": (127, 16), "w4a4": (7, 16)}
# Inputs in the middle between two whole numbers go either way, in float32 and float64.
EITHER_WAY = {"rotated int8": 2e-3}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_a_float64_reference(form, dense, tiny_clip):
    skip_unknown(form)
    clip, model = tiny_clip("flux"), stored(dense, form)
    found, prediction = gradients(model, clip, checkpoint=form == "float8")
    wanted, expected = reference(model, dense, clip, at_values=form in LARGEST)
    allowed = (ALLOWED | EITHER_WAY).get(form, 1e-5)
    assert distance([prediction], [expected]) < allowed
    assert distance(found, wanted) < allowed


@pytest.mark.parametrize("form", LARGEST)
def test_integers_are_off_by_no_more_than_their_roundings(form, dense):
    """|W (x - Q x)| <= |W| sqrt(n) step / 2 in each row, with a step of its largest rotated input in LARGEST steps.

    A rotation of neighbours keeps their norm, and none of them becomes larger than that.
    """
    from stylewright.nodes.bridge.frozen_layers import ComfyWeights

    skip_unknown(form)
    layer = stored(dense, form).model.diffusion_model.double_blocks[0].img_attn.qkv
    x = torch.randn(40, layer.in_features, generator=torch.Generator().manual_seed(0))
    cpu, (largest, neighbours) = torch.device("cpu"), LARGEST[form]
    with torch.no_grad(), ComfyWeights(cpu).dense(layer, torch.float32, cpu) as numbers:
        weight, bias = numbers.weight.double(), numbers.bias.double()
        off = (layer(x).double() - (x.double() @ weight.T + bias)).norm(dim=1)
    step = x.double().unflatten(1, (-1, neighbours)).norm(dim=2).amax(1) / largest
    bound = torch.linalg.matrix_norm(weight, 2) * math.sqrt(layer.in_features) * step / 2
    assert (off <= bound).all()
    assert (off > bound / 10).all(), "the bound is of this size"


@pytest.mark.parametrize("form", QUANTISED)
def test_the_way_back_through_a_layer_is_that_of_its_numbers(form, dense):
    from stylewright.nodes.bridge.frozen_layers import ComfyWeights
    from stylewright.training.frozen import dense_weight, frozen_products

    skip_unknown(form)
    layer = stored(dense, form).model.diffusion_model.double_blocks[0].img_attn.qkv
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with frozen_products(layer, ComfyWeights(torch.device("cpu"))):
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        wanted = dy.double() @ dense_weight(layer).double()
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["scaled float8", "int8"])
def test_products_in_the_weights_own_type(form, dense, tiny_clip):
    """Inputs are rounded to eight bits on the way there; the way back is that of the weights."""
    skip_unknown(form)
    clip, model = tiny_clip("flux"), stored(dense, form, fast=True)
    found, _ = gradients(model, clip)
    assert distance(found, reference(model, dense, clip, at_values=True)[0]) < 1e-4
    assert distance(found, reference(model, dense, clip)[0]) > 1e-3


CASES = {
    "autocast": ("float32", {"autocast": True}),
    **{form: (form, {}) for form in COPYING},
}


@pytest.mark.parametrize("case", CASES)
def test_no_copy_of_a_weight_is_kept(case, dense, tiny_clip, monkeypatch):
    form, options = CASES[case]
    skip_unknown(form)
    model, clip = stored(dense, form), tiny_clip("flux")
    assert copies(model, clip, **options) == 0
    without_the_mechanism(monkeypatch)
    if form in CAST:
        assert copies(stored(dense, form), clip, **options) > 100_000


@pytest.mark.parametrize("method", ["dora", "lokr", "loha", "oft"])
def test_every_method_trains_quantised_weights(method, dense, tiny_clip):
    clip, model = tiny_clip("flux"), stored(dense, "scaled float8")
    found, prediction = gradients(model, clip, method=method, fill=0.1)
    wanted, expected = reference(model, dense, clip, method=method, fill=0.1)
    assert distance([prediction], [expected]) < 1e-4
    assert distance(found, wanted) < 1e-4


TRAINED = [
    *(
        ("flux", form)
        for form in ("float32", "bfloat16", "float16", "float8", "scaled float8", "nvfp4", "int8", "w4a8")
    ),
    *(("sdxl", form) for form in ("float8 in bfloat16", "int8")),
]


@pytest.mark.parametrize("family, form", TRAINED)
def test_three_steps_leave_the_weights_alone_and_a_file_that_stock_loaders_take(
    family, form, tiny, tiny_clip, tmp_path
):
    import comfy.sd
    from safetensors.torch import load_file

    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors

    skip_unknown(form)
    model, clip = stored(tiny(family), form), tiny_clip(family)
    before, (places, numbers) = predict(model, clip), memory(model)
    result = three_steps(model, clip, tmp_path)
    assert result.steps_done == 3 and all(map(math.isfinite, result.losses))
    after = memory(model)
    assert after[0] == places, "weights moved, or were copied"
    assert all(torch.equal(after[1][key], numbers[key]) for key in numbers)
    assert torch.equal(predict(model, clip), before)

    trained = predict_as_trained(model, clip, result.path)
    applied = apply_adapter(model, None, read_tensors(result.path), Strengths(), warn=pytest.fail)
    assert applied.homeless == applied.missized == ()
    stock, _ = comfy.sd.load_lora_for_models(model, None, load_file(result.path), 1.0, 0.0)
    # ComfyUI rounds a patched weight to the form it is kept in.
    allowed = 1e-3 if form == "float32" else 0.06
    assert distance([predict(stock, clip)], [trained]) < allowed * (1 + distance([trained], [before]))
    assert distance([trained], [before]) > 0.03
