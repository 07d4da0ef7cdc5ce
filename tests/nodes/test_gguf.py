"""A GGUF model of ComfyUI-GGUF, where COMFYUI_GGUF_PATH names a checkout of that pack and gguf is installed."""

import math

import pytest
import torch
from stored_files import gguf_nodes, without_gguf, write_gguf
from stored_steps import copies, distance, without_the_mechanism
from training_runs import memory, predict, predict_as_trained, three_steps

pytestmark = [pytest.mark.comfy, pytest.mark.skipif(bool(without_gguf()), reason=without_gguf())]


@pytest.fixture
def model(random_weights, tmp_path, monkeypatch):
    """The small FLUX of random weights, written as GGUF and opened by the pack's own node."""
    import folder_paths
    from safetensors.torch import load_file

    write_gguf(tmp_path / "tiny.gguf", load_file(random_weights / "transformer.safetensors"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "unet_gguf", ([str(tmp_path)], {".gguf"}))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], set()))
    with torch.inference_mode():
        return gguf_nodes().UnetLoaderGGUF().load_unet("tiny.gguf")[0]


def test_three_steps_leave_the_bytes_alone_and_a_file_that_stock_loaders_take(model, embedded, tmp_path):
    import comfy.sd
    from safetensors.torch import load_file

    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors

    before, (places, numbers) = predict(model, embedded.clip), memory(model)
    assert any(type(p).__name__ == "GGMLTensor" and p.dtype is torch.uint8 for p in model.model.parameters())
    result = three_steps(model, embedded.clip, tmp_path)
    assert all(map(math.isfinite, result.losses))
    after = memory(model)
    assert after[0] == places
    assert all(torch.equal(after[1][name], numbers[name]) for name in numbers)
    assert torch.equal(predict(model, embedded.clip), before)
    trained = predict_as_trained(model, embedded.clip, result.path)
    applied = apply_adapter(model, None, read_tensors(result.path), Strengths(), warn=pytest.fail)
    assert applied.homeless == applied.missized == ()
    stock, _ = comfy.sd.load_lora_for_models(model, None, load_file(result.path), 1.0, 0.0)
    assert distance([predict(stock, embedded.clip)], [trained]) < 2e-3
    assert distance([trained], [before]) > 0.01


def test_gradients_are_those_of_the_numbers_in_the_file(model, embedded):
    """Of each layer, in float64; and through the whole model nothing of a weight is kept."""
    from stylewright.nodes.bridge.frozen_layers import ComfyWeights
    from stylewright.training.frozen import FrozenProduct, dense_weight, frozen_products, is_multiplying

    network, kinds = model.model.diffusion_model, set()
    with frozen_products(network, ComfyWeights(torch.device("cpu"))):
        for layer in filter(is_multiplying, network.modules()):
            with torch.inference_mode(False), torch.enable_grad():
                x = torch.randn(3, layer.in_features, requires_grad=True)
                y = layer(x)
                dy = torch.randn_like(y)
                y.backward(dy)
            weight = dense_weight(layer).double()
            assert weight.shape == (layer.out_features, layer.in_features)
            torch.testing.assert_close(x.grad.double(), dy.double() @ weight, rtol=1e-4, atol=1e-5)
            kinds.add((layer.weight.dtype, type(y.grad_fn).__name__))
    assert (torch.uint8, f"{FrozenProduct.__name__}Backward") in kinds


def test_no_copy_of_a_weight_is_kept(model, embedded, monkeypatch):
    assert copies(model, embedded.clip) == 0
    without_the_mechanism(monkeypatch)
    assert copies(model, embedded.clip) > 100_000
