"""A GGUF model of ComfyUI-GGUF, where COMFYUI_GGUF_PATH names a checkout of that pack and gguf is installed."""

import importlib.util
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from stored_steps import copies, distance, without_the_mechanism
from training_runs import predict, predict_as_trained, three_steps

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(
        "COMFYUI_GGUF_PATH" not in os.environ or importlib.util.find_spec("gguf") is None,
        reason="no ComfyUI-GGUF (set COMFYUI_GGUF_PATH, and install gguf)",
    ),
]

# What kinds of layers are kept in; all others in float32.
KINDS = {
    "img_attn": "Q8_0",
    "txt_attn": "Q5_1",
    "img_mlp": "Q4_0",
    "txt_mlp": "BF16",
    "linear1": "Q8_0",
    "linear2": "F16",
}


@pytest.fixture(scope="module")
def pack():
    folder = Path(os.environ["COMFYUI_GGUF_PATH"])
    spec = importlib.util.spec_from_file_location("comfyui_gguf", folder / "__init__.py")
    module = sys.modules["comfyui_gguf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return sys.modules["comfyui_gguf.nodes"]


@pytest.fixture
def model(pack, random_weights, tmp_path, monkeypatch):
    """The small FLUX of random weights, written as GGUF and opened by the pack's own node."""
    import folder_paths
    import gguf
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "flux")
    for key, tensor in load_file(random_weights / "transformer.safetensors").items():
        numbers = tensor.float().numpy()
        name = next((KINDS[part] for part in KINDS if f".{part}" in key and tensor.ndim == 2), "F32")
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(key, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "unet_gguf", ([str(tmp_path)], {".gguf"}))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], set()))
    with torch.inference_mode():
        return pack.UnetLoaderGGUF().load_unet("tiny.gguf")[0]


def packed(model):
    """Where the bytes of the model are, and a copy of them."""
    parameters = dict(model.model.named_parameters())
    plain = {name: p.as_subclass(torch.Tensor) for name, p in parameters.items()}
    return {name: p.data_ptr() for name, p in plain.items()}, {name: p.clone() for name, p in plain.items()}


def test_three_steps_leave_the_bytes_alone_and_a_file_that_stock_loaders_take(model, embedded, tmp_path):
    import comfy.sd
    from safetensors.torch import load_file

    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors

    before, (places, numbers) = predict(model, embedded.clip), packed(model)
    assert any(type(p).__name__ == "GGMLTensor" and p.dtype is torch.uint8 for p in model.model.parameters())
    result = three_steps(model, embedded.clip, tmp_path)
    assert all(map(math.isfinite, result.losses))
    after = packed(model)
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
