"""Adapters on layers that peft does not know, against the same layers as torch's own."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import METHODS, AdapterConfig
from stylewright.training.adapters.stand_in import base_weight, needs_stand_in, stand_in
from stylewright.training.frozen import Dense, PlainWeights, frozen_products

SIDE = 8


class Packed(nn.Module):
    """A linear layer whose weight is bytes."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        packed = torch.frombuffer(bytearray(dense.weight.detach().numpy().tobytes()), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = dense.bias

    def unpacked(self):
        return self.weight.detach().view(torch.float32).view(self.out_features, self.in_features)

    def forward(self, x):
        return nn.functional.linear(x, self.unpacked().clone(), self.bias)


class Unpacking(PlainWeights):
    def __init__(self):
        self.asked = 0

    def as_stored(self, layer, dtype, device):
        return not isinstance(layer, Packed) and super().as_stored(layer, dtype, device)

    def is_product(self, layer):
        return isinstance(layer, Packed) or super().is_product(layer)

    @contextmanager
    def dense(self, layer, dtype, device):
        self.asked += 1
        if isinstance(layer, Packed):
            yield Dense(layer.unpacked().to(device, dtype), layer.bias.to(device, dtype))
        else:
            with super().dense(layer, dtype, device) as dense:
                yield dense


def nets():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        dense = nn.Sequential(nn.Linear(SIDE, 2 * SIDE), nn.Tanh(), nn.Linear(2 * SIDE, SIDE))
        x = torch.randn(3, 5, SIDE)
    dense.requires_grad_(False)
    return dense, nn.Sequential(Packed(dense[0]), nn.Tanh(), Packed(dense[2])), x


def step(net, x, method):
    """Output, gradients and tensors of an adapter with random factors, and its layers' frozen weights."""
    x = x.clone().requires_grad_()
    config = AdapterConfig(method, rank=4, targets=("0", "2"))
    with attached(net, config, family="other", seed=5) as adapter:
        torch.testing.assert_close(net(x), bare(net, x), rtol=1e-6, atol=1e-6)
        before = adapter.state_dict()
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
        y = net(x)
        y.square().sum().backward()
        weights = [base_weight(net[0]), base_weight(net[2])]
        return before, [y.detach(), x.grad, *(parameter.grad for parameter in adapter.parameters())], weights


def bare(net, x):
    base = [net[index].get_base_layer() for index in (0, 2)]
    return base[1](torch.tanh(base[0](x)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_on_packed_weights_as_on_dense_ones(method):
    dense, packed, x = nets()
    before = list(packed.named_modules())
    wanted_state, wanted, weights = step(dense, x, method)
    with frozen_products(packed, Unpacking()):
        state, found, mine = step(packed, x, method)
    assert list(packed.named_modules()) == before
    assert state.keys() == wanted_state.keys()
    torch.testing.assert_close(state, wanted_state)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(mine, weights, strict=True))


def test_a_lora_asks_for_no_weight_but_in_the_backward_pass():
    _, packed, x = nets()
    host = Unpacking()
    with frozen_products(packed, host), attached(packed, AdapterConfig(rank=2, targets=("0", "2")), family="x", seed=0):
        packed(x.requires_grad_())
        assert host.asked == 0
        packed(x).sum().backward()
        assert host.asked == 2


@pytest.mark.parametrize("method", ["dora", "oft"])
def test_weights_that_nobody_can_read_are_refused_where_they_are_needed(method):
    _, packed, x = nets()
    names = list(packed.named_modules())
    message = rf"{method} needs the numbers .* layer 0, a .*Packed, cannot be read: choose"
    adapting = attached(packed, AdapterConfig(method, rank=4, targets=("0", "2")), family="x", seed=0)
    with pytest.raises(ValueError, match=message), adapting:
        pass
    assert list(packed.named_modules()) == names
    with attached(packed, AdapterConfig(rank=2, targets=("0", "2")), family="x", seed=0) as adapter:
        packed(x.requires_grad_()).sum().backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_dora_on_float8():
    dense, _, _ = nets()
    config = AdapterConfig("dora", rank=4, targets=("0", "2"))
    eight = nn.Sequential(*(part.to(torch.float8_e4m3fn) if isinstance(part, nn.Linear) else part for part in dense))
    with attached(eight, config, family="x", seed=0) as adapter:
        norms = [value for name, value in adapter.state_dict().items() if "magnitude" in name]
    assert torch.equal(norms[0].flatten(), eight[0].weight.float().norm(dim=1))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, (3, 1), 2, groups=2), nn.Conv1d(4, 6, 3, dilation=2, bias=False), nn.Linear(3, 4)]
)
def test_a_stand_in_looks_like_its_layer(layer):
    shown = stand_in(layer)
    assert isinstance(shown, type(layer)) and shown.weight.shape == layer.weight.shape
    assert shown.weight.untyped_storage().nbytes() == 4
    shown.shows_weights = True
    assert torch.equal(shown.weight, layer.weight)
    assert (shown.bias is None) if layer.bias is None else torch.equal(shown.bias, layer.bias)
    assert not needs_stand_in(layer) and needs_stand_in(layer.to(torch.float8_e5m2))
    assert list(dict(shown.named_parameters())) == [f"layer.{name}" for name, _ in layer.named_parameters()]
