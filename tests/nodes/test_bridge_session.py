"""What a training session changes in ComfyUI, and that it puts it back."""

import json

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.comfy


def test_inference_tensors_are_exchanged_without_a_copy():
    from stylewright.nodes.bridge.differentiable import exchange_inference_tensors

    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        module[0].cached = torch.ones(2, 5)[:, 1:4]
        module[0].weight._model_dtype = torch.float16
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    values = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert exchange_inference_tensors(module) == 2 + 5 + 1
    after = module.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before
    assert all(torch.equal(after[name], values[name]) for name in values)
    assert not any(tensor.is_inference() for tensor in (*after.values(), module[0].cached))
    assert module[0].cached.stride() == (5, 1)
    assert module[0].weight._model_dtype is torch.float16
    assert not module[0].weight.requires_grad
    assert exchange_inference_tensors(module) == 0
    x = torch.randn(2, 3, requires_grad=True)
    module.eval()(x).sum().backward()
    assert x.grad is not None


def test_a_subclass_is_exchanged_over_its_memory():
    """As in GGUF: packed bytes with notes on them."""
    from stylewright.nodes.bridge.differentiable import ordinary

    class Packed(torch.Tensor):
        pass

    with torch.inference_mode():
        tensor = nn.Parameter(torch.arange(6, dtype=torch.uint8).as_subclass(Packed), requires_grad=False)
        tensor.tensor_shape = (2, 3)
    alias = ordinary(tensor)
    assert type(alias) is Packed and isinstance(alias, nn.Parameter) and not alias.is_inference()
    assert alias.data_ptr() == tensor.data_ptr() and alias.tensor_shape == (2, 3)


def test_a_quantised_weight_stays_and_is_trained_through():
    """It could not be moved in inference mode any more, had it been made anew outside."""
    import comfy.ops

    from stylewright.nodes.bridge.differentiable import exchange_inference_tensors
    from stylewright.nodes.bridge.frozen_layers import ComfyWeights
    from stylewright.training.frozen import frozen_products

    with torch.inference_mode():
        layer = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=["nvfp4"]).Linear(32, 16, bias=True)
        layer.load_state_dict({**quantised_state(torch.randn(16, 32)), "bias": torch.randn(16)})
    weight = layer.weight
    assert weight.is_inference() and exchange_inference_tensors(layer) == 1
    assert layer.weight is weight
    x = torch.randn(2, 32, requires_grad=True)
    with frozen_products(layer, ComfyWeights(torch.device("cpu"))):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1))
    with torch.inference_mode():
        assert torch.equal(layer.to("cpu").weight.dequantize(), weight.dequantize())


def quantised_state(weight):
    from comfy.quant_ops import QuantizedTensor

    state = QuantizedTensor.from_float(weight, "TensorCoreNVFP4Layout").state_dict("weight")
    marker = list(json.dumps({"format": "nvfp4"}).encode())
    return {**state, "comfy_quant": torch.tensor(marker, dtype=torch.uint8)}


@pytest.mark.parametrize("fail", [False, True])
def test_everything_is_put_back(fail, tiny):
    import comfy.model_management as management

    from stylewright.nodes.bridge.session import training_session

    model = tiny("flux")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.inference_mode():
        try:
            with training_session(model):
                assert management.in_training
                assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
                assert model.model.current_patcher is model
                torch.rand(100)
                if fail:
                    raise management.InterruptProcessingException
        except management.InterruptProcessingException:
            assert fail
        assert torch.is_inference_mode_enabled()
    assert not management.in_training
    assert model.model.current_patcher is None
    assert torch.equal(torch.rand(3), expected)


def test_patches_of_nodes_before_are_part_of_the_model(tiny, tiny_clip):
    """A LoRA under the one in training changes what it is trained on, and is gone from the weights afterwards."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session

    base, clip = tiny("flux"), tiny_clip("flux")
    patched = base.clone()
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    weight = base.model.state_dict()[key]
    patched.add_patches({key: ("diff", (torch.randn_like(weight) * 0.2,))})
    x_t, levels = torch.randn(1, 16, 8, 12), torch.tensor([-2.0])

    def predict(model):
        with torch.inference_mode(), training_session(model), torch.no_grad():
            prompts = PromptTable(clip)
            return ComfyDenoiser(model, prompts)(x_t, levels, prompts.encode(["a star"]))

    plain, under_patch, again = predict(base), predict(patched), predict(base)
    assert not torch.allclose(plain, under_patch)
    assert torch.equal(plain, again)


def test_a_float16_model_is_trained_in_another_type_over_the_same_weights(tiny, tiny_clip):
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session, without_float16
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.gradients import differentiable

    with torch.inference_mode():
        model = tiny("flux", torch.float16)
    other = tiny("flux")
    assert without_float16(other, torch.bfloat16) is other
    weight = model.model.diffusion_model.img_in.weight.data_ptr()
    wide = without_float16(model, torch.float32)
    x_t, levels = torch.randn(1, 16, 8, 12), torch.tensor([-2.0])
    with torch.inference_mode(), training_session(wide):
        assert model.model.get_dtype_inference() is torch.float32
        prompts = PromptTable(tiny_clip("flux"))
        denoiser = ComfyDenoiser(wide, prompts)
        config = AdapterConfig(rank=2)
        with (
            attached(denoiser.module, config, family="flux", seed=0) as adapter,
            differentiable(denoiser.module),
        ):
            wanted = denoiser(x_t, levels, prompts.encode(["a star"]))
            (1e-6 * wanted).sum().backward()
            gradients = [parameter.grad for parameter in adapter.parameters()]
            assert any(0 < float(gradient.abs().max()) < 1e-3 for gradient in gradients)
            assert all(gradient.dtype is torch.float32 for gradient in gradients)
    assert model.model.diffusion_model.img_in.weight.data_ptr() == weight
    with torch.inference_mode(), training_session(model), torch.no_grad():
        assert model.model.get_dtype_inference() is torch.float16
        prompts = PromptTable(tiny_clip("flux"))
        narrow = ComfyDenoiser(model, prompts)(x_t, levels, prompts.encode(["a star"]))
    torch.testing.assert_close(narrow, wanted.detach(), rtol=0.05, atol=0.05)
