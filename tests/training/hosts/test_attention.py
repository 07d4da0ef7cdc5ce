"""Attention written out against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from stylewright.training.hosts.attention import PlainAttention


def qkv(dtype=torch.float64):
    return [torch.randn(3, 2, n, 8, dtype=dtype, requires_grad=True) for n in (5, 7, 7)]


def gradients(tensors, **options):
    output = F.scaled_dot_product_attention(*tensors, **options)
    return output, torch.autograd.grad(output.square().sum(), tensors)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_torchs(scale):
    tensors = qkv()
    expected, expected_gradients = gradients(tensors, scale=scale)
    with PlainAttention():
        output, ours = gradients(tensors, scale=scale)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ours, expected_gradients)
    assert "Bmm" in output.grad_fn.next_functions[0][0].name() + output.grad_fn.name()
    assert "Bmm" not in expected.grad_fn.name()


@pytest.mark.parametrize(
    "options",
    [{"attn_mask": torch.rand(5, 7) > 0.5}, {"is_causal": True}, {"attn_mask": torch.rand(3, 1, 5, 7).double()}],
)
def test_what_it_does_not_know_is_left_to_torch(options):
    tensors = qkv()
    expected, _ = gradients(tensors, **options)
    with PlainAttention():
        output, _ = gradients(tensors, **options)
    torch.testing.assert_close(output, expected, equal_nan=True)


def test_it_ends_with_its_block():
    with pytest.raises(RuntimeError, match="stop"), PlainAttention():
        raise RuntimeError("stop")
    assert "Bmm" not in F.scaled_dot_product_attention(*qkv()).grad_fn.name()


def test_a_whole_model_goes_through_it():
    from diffusers import FluxTransformer2DModel

    sizes = {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    model = FluxTransformer2DModel(**sizes, joint_attention_dim=8, pooled_projection_dim=8).double()
    inputs = {
        "hidden_states": torch.randn(2, 6, 8).double(),
        "encoder_hidden_states": torch.randn(2, 3, 8).double(),
        "pooled_projections": torch.randn(2, 8).double(),
        "timestep": torch.rand(2).double(),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    expected = model(**inputs)[0]
    with PlainAttention(), torch.profiler.profile() as profile:
        output = model(**inputs)[0]
    torch.testing.assert_close(output, expected)
    assert not [event.name for event in profile.events() if "scaled_dot_product" in event.name]
