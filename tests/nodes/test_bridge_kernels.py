"""Kernels and attentions without a backward pass: what stands in for them while a model is trained."""

import comfy.ldm.modules.attention
import comfy_kitchen
import pytest
import torch
from tiny_models import TinyClip, tiny_model

from stylewright.nodes.bridge.denoiser import ComfyDenoiser
from stylewright.nodes.bridge.kernels import plain_kernels
from stylewright.nodes.bridge.prompts import PromptTable
from stylewright.nodes.bridge.session import training_session
from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.gradients import differentiable

pytestmark = pytest.mark.comfy


def slopes(model) -> torch.Tensor:
    """The size of the gradient of every parameter of an adapter, (n,)."""
    prompts = PromptTable(TinyClip("flux"))
    x_t = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    with training_session(model):
        denoiser = ComfyDenoiser(model, prompts)
        with attached(denoiser.module, AdapterConfig(rank=2), family="flux", seed=0) as adapter:
            for parameter in adapter.parameters():
                parameter.data.fill_(0.05)
            with differentiable(denoiser.module):
                denoiser(x_t, torch.tensor([-1.0]), prompts.encode(["a star"])).square().mean().backward()
            return torch.stack([torch.zeros(()) if p.grad is None else p.grad.norm() for p in adapter.parameters()])


def without_backward(q, k, v, heads, *args, **kwargs):
    """As SageAttention is: the result knows nothing of what it was made from."""
    with torch.no_grad():
        return comfy.ldm.modules.attention.attention_pytorch(q, k, v, heads, *args, **kwargs)


def test_an_attention_chosen_for_all_of_comfyui_is_replaced_where_gradients_would_end(monkeypatch):
    expected = slopes(tiny_model("flux"))
    import comfy.ldm.flux.math

    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", without_backward)
    found = slopes(tiny_model("flux"))
    assert comfy.ldm.flux.math.optimized_attention is without_backward
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_an_attention_chosen_by_a_node_is_kept_only_where_gradients_pass(caplog):
    expected = slopes(tiny_model("flux"))
    calls = []

    def scaled(attention, q, k, v, *args, **kwargs):
        calls.append(len(q))
        return attention(q, k, v, *args, **kwargs) * 0.5

    def sage(attention, *args, **kwargs):
        return without_backward(*args, **kwargs)

    kept, replaced = tiny_model("flux"), tiny_model("flux")
    kept.model_options["transformer_options"]["optimized_attention_override"] = scaled
    replaced.model_options["transformer_options"]["optimized_attention_override"] = sage
    assert not torch.allclose(slopes(kept), expected, rtol=1e-2) and len(calls) == 4  # blocks
    assert "no backward pass" not in caplog.text
    torch.testing.assert_close(slopes(replaced), expected, rtol=1e-3, atol=1e-7)
    assert caplog.text.count("no backward pass") == 1


def test_fused_kernels_are_differentiable_inside_and_themselves_again_outside():
    q, k = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in "qk")
    angles = torch.randn(1, 1, 3, 4, 2, 2)
    before = comfy_kitchen.apply_rope
    expected = before(q.detach(), k.detach(), angles)
    with plain_kernels(torch.nn.Identity()):
        rotated = comfy_kitchen.apply_rope(q, k, angles)
        (rotated[0].sum() + rotated[1].sum()).backward()
    assert comfy_kitchen.apply_rope is before
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
    torch.testing.assert_close(rotated[0].detach(), expected[0])
