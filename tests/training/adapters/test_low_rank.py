"""LoRA's products against peft's own forward and against differences."""

import copy

import pytest
import torch
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.low_rank import LowRank, low_rank_products
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.randomness import generator

INPUTS, OUTPUTS, RANK = 12, 20, 3
SHAPES = [(7, INPUTS), (2, 5, INPUTS), (2, 3, 4, INPUTS), (INPUTS,)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(method="lora", *, bias=True, dtype=torch.float32, alpha=2.0, dropout=0.0):
    """peft's layer around a linear one, with an adapter that does something, and peft's own forward."""
    from peft import inject_adapter_in_model

    from stylewright.training.adapters.methods import peft_config

    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=bias)).to(dtype)
        config = AdapterConfig(method, rank=RANK, alpha=alpha, dropout=dropout, targets=("0",))
        inject_adapter_in_model(peft_config(config, ["0"]), net)
        for name, parameter in net.named_parameters():
            if "lora" in name:
                parameter.data = torch.randn(parameter.shape)
    return net[0].eval()


def gradients(adapted, x, weights, of=None):
    """Output and the gradients of input, A and B: those of the layer ``of``, where ``adapted`` is none."""
    x = x.clone().requires_grad_(True)
    parameters = [parameter for name, parameter in (of or adapted).named_parameters() if "lora" in name]
    output = adapted(x)
    return output, *torch.autograd.grad((output.float() * weights).sum(), [x, *parameters])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_differences(shape):
    x, a, b = draw(*shape, dtype=torch.float64), draw(RANK, INPUTS, seed=1).double(), draw(OUTPUTS, RANK).double()
    result = draw(*shape[:-1], OUTPUTS, seed=2, dtype=torch.float64)
    tensors = [tensor.requires_grad_(True) for tensor in (result, x, a, b)]
    assert torch.autograd.gradcheck(lambda *given: LowRank.apply(*given, 0.7), tensors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_results_are_pefts(method, shape, bias):
    adapted, x, weights = layer(method, bias=bias), draw(*shape), draw(*shape[:-1], OUTPUTS, seed=1)
    theirs = gradients(adapted, x, weights)
    with low_rank_products([adapted]):
        assert "forward" in vars(adapted)
        ours = gradients(adapted, x, weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(adapted(x), theirs[0])  # peft's own way is back


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_types_are_pefts(dtype, autocast):
    adapted, x, weights = layer(dtype=dtype), draw(2, 5, INPUTS).to(dtype), draw(2, 5, OUTPUTS, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = gradients(adapted, x, weights)
        with low_rank_products([adapted]):
            ours = gradients(adapted, x, weights)
            repeated = gradients(adapted, x, weights)
    for one, other, again in zip(ours, theirs, repeated, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())
        assert torch.equal(one, again)


def test_backward_outside_of_autocast():
    adapted, x = layer(), draw(2, 5, INPUTS).requires_grad_(True)
    with low_rank_products([adapted]):
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(x).float().square().mean()
        loss.backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for name, p in adapted.named_parameters() if "lora" in name)


def test_an_input_without_gradient():
    adapted, x = layer(), draw(2, 5, INPUTS)
    with low_rank_products([adapted]):
        adapted(x).square().mean().backward()
        ours = [p.grad.clone() for name, p in adapted.named_parameters() if "lora" in name]
    adapted.zero_grad()
    adapted(x).square().mean().backward()
    for one, other in zip(ours, (p.grad for n, p in adapted.named_parameters() if "lora" in n), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_is_the_adapters_alone():
    adapted, x = layer(dropout=0.5), draw(2, 5, INPUTS)
    with low_rank_products([adapted]):
        adapted.train()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            ours = adapted(x)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = adapted(x)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(theirs, adapted.eval()(x))


def test_no_gradient_is_lost_through_recomputation():
    from torch.utils.checkpoint import checkpoint

    adapted, x, weights = layer(), draw(2, 5, INPUTS), draw(2, 5, OUTPUTS, seed=1)
    with low_rank_products([adapted]):
        plain = gradients(adapted, x, weights)
        names = {name: parameter for name, parameter in adapted.named_parameters() if "lora" in name}
        output = checkpoint(adapted, x, use_reentrant=False)
        again = torch.autograd.grad((output * weights).sum(), list(names.values()))
    assert all(map(torch.equal, plain[2:], again))


@pytest.mark.parametrize("method, fused", [("lora", 2), ("rslora", 2), ("dora", 0), ("loha", 0)])
def test_only_plain_lora_on_linear_layers_is_changed(method, fused):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Conv2d(6, 6, 1))
    before = copy.deepcopy([set(vars(part)) for part in net])
    config = AdapterConfig(method, rank=2, targets=("0", "1", "2"))
    with attached(net, config, family="other", seed=0) as adapter:
        inside = [net.get_submodule(name) for name in adapter.names]
        assert sum("forward" in vars(part) for part in inside) == fused
        with adapter.dropout(generator(0, "dropout")):
            net[:2](torch.randn(3, 8, generator=generator(0, "x"))).sum().backward()
    assert not any("forward" in vars(part) for part in inside)
    assert [set(vars(part)) for part in net] == before


def test_the_output_may_be_written_into():
    """As the blocks of ComfyUI's UNet and diffusers' ResNets do."""
    adapted, x, weights = layer(), draw(2, 5, INPUTS), draw(2, 5, OUTPUTS, seed=1)
    with low_rank_products([adapted]):
        plain = gradients(adapted, x, weights)
        written = gradients(lambda given: adapted(given).mul_(2.0), x, weights, adapted)
    for one, other in zip(plain, written, strict=True):
        torch.testing.assert_close(2 * one, other)
