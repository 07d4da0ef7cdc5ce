"""Weights that are brought to the device, and patched, anew in every call: as with --lowvram and dynamic VRAM.

On the CPU that is ComfyUI's own partial loading with a budget, a page of dynamic VRAM on a layer, and one cast buffer
for all layers in place of those of its streams.
"""

import inspect

import pytest
import torch
from stored_models import stored
from stored_steps import copies, distance, gradients, reference, without_the_mechanism

pytestmark = pytest.mark.comfy

CPU = torch.device("cpu")


@pytest.fixture
def dense(tiny):
    return tiny("flux")


@pytest.fixture
def partial_loading(monkeypatch):
    """ComfyUI loads 60 kB of a model, and leaves the rest where it is."""
    import comfy.model_management

    def load(models, **options):
        models[0].load(CPU, lowvram_model_memory=60_000)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)


def with_stock_lora(model):
    """A LoRA of a stock loader below ours, on every attention's first layer."""
    patched = model.clone()
    draw = torch.Generator().manual_seed(8)
    for name, part in patched.model.diffusion_model.named_modules():
        if name.endswith(("qkv", "linear1")):
            patch = torch.randn(part.out_features, part.in_features, generator=draw) * 0.05
            patched.add_patches({f"diffusion_model.{name}.weight": ("diff", (patch,))})
    return patched


def layers(model):
    return [part for part in model.model.diffusion_model.modules() if "in_features" in vars(part)]


@pytest.mark.parametrize("form", ["float32", "float8", "scaled float8"])
def test_a_lora_below_ours_that_is_applied_in_every_call(form, dense, tiny_clip, partial_loading, monkeypatch):
    clip, model = tiny_clip("flux"), with_stock_lora(stored(dense, form))
    found, prediction = gradients(model, clip)
    assert sum(bool(layer.weight_function) for layer in layers(model)) >= 3, "nothing was left off the device"
    wanted, expected = reference(model, dense, clip)
    assert distance([prediction], [expected]) < 1e-5
    assert distance(found, wanted) < 1e-5
    assert copies(model, clip) == 0
    if form != "scaled float8":
        without_the_mechanism(monkeypatch)
        assert copies(model, clip) > 0


@pytest.fixture
def one_buffer(monkeypatch):
    """Every cast goes through the same memory, as through the buffer of a stream on a GPU."""
    import comfy.ops

    cast, buffer = comfy.ops.cast_bias_weight, torch.empty(2**16)

    def cast_into_buffer(layer, *args, **kwargs):
        weight, bias, *stream = cast(layer, *args, **kwargs)
        if weight.ndim == 2:
            weight = buffer[: weight.numel()].view(weight.shape).copy_(weight)
        return weight, bias, *stream

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_into_buffer)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_buffer_that_the_next_layer_overwrites(checkpoint, dense, tiny_clip, one_buffer, monkeypatch):
    clip, model = tiny_clip("flux"), stored(dense, "float8")
    wanted, _ = reference(model, dense, clip)
    found, _ = gradients(model, clip, checkpoint=checkpoint)
    assert distance(found, wanted) < 1e-5
    if not checkpoint:
        without_the_mechanism(monkeypatch)
        try:
            wrong, _ = gradients(model, clip)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert distance(wrong, wanted) > 0.1


def test_a_page_of_dynamic_vram(dense, tiny_clip, partial_loading, monkeypatch):
    """Whoever holds on to such a weight holds on to memory that is somebody else's after the call."""
    import comfy.ops

    if "is_device_cpu" not in inspect.getsource(comfy.ops.cast_bias_weight):
        pytest.skip("this ComfyUI has no pages on a CPU")
    clip, model = tiny_clip("flux"), stored(dense, "float32")
    wanted, _ = reference(model, dense, clip)
    for layer in layers(model):
        layer._v, layer.comfy_cast_weights = object(), True
    found, _ = gradients(model, clip)
    assert distance(found, wanted) < 1e-5
    assert copies(model, clip) == 0
    without_the_mechanism(monkeypatch)
    assert copies(model, clip) > 100_000
