"""Frozen layers: gradients as torch's own, nothing kept, nothing left behind."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from stylewright.training.frozen import PLAIN, Dense, FrozenForward, PlainWeights, dense_weight, frozen_products

LAYERS = {
    "linear": (nn.Linear(6, 5), (2, 3, 6)),
    "vector": (nn.Linear(6, 5, bias=False), (6,)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), dilation=(2, 1), groups=2), (2, 4, 7, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (1, 2, 4, 5)),
    "reflecting": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 4, 5)),
}


class Half(PlainWeights):
    """A host whose layers are kept in float16 and compute in the type of their input."""

    def __init__(self):
        self.asked = 0

    def is_product(self, layer):
        return type(layer) is Streaming

    @contextmanager
    def dense(self, layer, dtype, device):
        self.asked += 1
        yield Dense(layer.cast(dtype), None)


class Streaming(nn.Module):
    """A linear layer that makes its weight in one buffer for all layers, as hosts with little memory do."""

    buffer = torch.empty(64)

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.weight = nn.Parameter(torch.randn(8, 8).half(), requires_grad=False)
        self.bias = None

    def cast(self, dtype):
        return self.buffer.copy_(self.weight.detach().flatten()).view(8, 8).to(dtype)

    def forward(self, x):
        return nn.functional.linear(x, self.cast(x.dtype))


def input_for(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_torchs_own(name):
    """Weights in float32 under an input in float64, as a host would cast them."""
    layer, shape = LAYERS[name]
    layer = layer.double().requires_grad_(False)
    x, other = input_for(shape), input_for(shape)
    weights = PlainWeights()
    weights.as_stored = lambda *args: False
    wanted = layer(x).tanh()
    with frozen_products(layer, weights):
        found = layer(other).tanh()
        found.sum().backward()
    wanted.sum().backward()
    assert torch.equal(found, wanted)
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-12, atol=1e-12)


def kept_by(function):
    """Bytes that autograd keeps."""
    storages = {}

    def keep(tensor):
        storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storages.values())


def test_nothing_is_kept_where_a_weight_is_cast():
    layer, x = nn.Linear(64, 64).requires_grad_(False), input_for((2, 64), torch.float32)

    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    assert kept_by(under_autocast) >= 64 * 64 * 2
    with frozen_products(layer):
        assert kept_by(under_autocast) == 0
        assert under_autocast().dtype is torch.bfloat16


def test_gradients_under_autocast_are_those_of_autocast():
    layer, x, other = nn.Linear(64, 32).requires_grad_(False), *(input_for((5, 64), torch.float32) for _ in "ab")
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
        with frozen_products(layer):
            layer(other).float().square().sum().backward()
    assert other.grad.dtype is torch.float32
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-2, atol=1e-2 * float(x.grad.std()))


def test_a_weight_that_needs_no_cast_is_left_to_torch():
    layer, x = nn.Linear(4, 4).requires_grad_(False), input_for((2, 4), torch.float32)
    with frozen_products(layer):
        assert type(layer(x).grad_fn).__name__ == "AddmmBackward0"
        layer.requires_grad_(True)
        layer.double()(x.double()).sum().backward()
        assert layer.weight.grad is not None
        with torch.no_grad():
            assert layer(x.double()).grad_fn is None


@pytest.mark.parametrize("recompute", [False, True])
def test_a_buffer_that_layers_share_is_read_again(recompute):
    """Without the mechanism every gradient is that of the last layer's weight."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Streaming() for _ in range(3)))
    wanted = input_for((2, 8), torch.float32)
    out = wanted
    for layer in layers:
        out = nn.functional.linear(out, layer.weight.float()).tanh()
    out.sum().backward()

    def gradient():
        x, out = input_for((2, 8), torch.float32), None
        out = x
        for layer in layers:
            out = (
                checkpoint(lambda v, f=layer: f(v).tanh(), out, use_reentrant=False) if recompute else layer(out).tanh()
            )
        out.sum().backward()
        return x.grad

    host = Half()
    with frozen_products(layers, host):
        torch.testing.assert_close(gradient(), wanted.grad)
    assert host.asked == 3
    with frozen_products(layers):  # a class that nobody knows: run again
        torch.testing.assert_close(gradient(), wanted.grad)
    if not recompute:
        with pytest.raises((RuntimeError, AssertionError)):
            torch.testing.assert_close(gradient(), wanted.grad)


def test_outputs_may_be_written_into():
    class Viewing(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).view(*x.shape[:-1], -1)

    layer, x, other = Viewing(4, 4).requires_grad_(False), *(input_for((2, 3, 4), torch.float32) for _ in "ab")
    weights = PlainWeights()
    weights.as_stored, weights.is_product = lambda *args: False, lambda layer: True
    with frozen_products(layer, weights):
        y = layer(x)
        y += 1
        y.mul_(2).sum().backward()
    (2 * (layer(other) + 1)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_it_is_taken_off_without_a_trace():
    net = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.LayerNorm(2))
    foreign = net[1].forward = net[1].forward
    before = [set(vars(part)) for part in net.modules()]
    with pytest.raises(KeyError), frozen_products(net):
        assert isinstance(net[0].forward, FrozenForward) and isinstance(net[1].forward, FrozenForward)
        first = net[0].forward
        with frozen_products(net):  # an outer host goes before
            assert net[0].forward is first
        assert net[0].forward is first
        raise KeyError
    assert [set(vars(part)) for part in net.modules()] == before
    assert net[1].forward is foreign


def test_a_dense_weight_is_the_hosts():
    layer = Streaming()
    with frozen_products(layer, Half()):
        assert torch.equal(dense_weight(layer), layer.weight.float())
    plain = nn.Linear(2, 3).to(torch.float8_e4m3fn)
    assert torch.equal(dense_weight(plain), plain.weight.float())
    with PLAIN.dense(nn.Linear(2, 3), torch.float64, torch.device("cpu")) as dense:
        assert dense.weight.dtype is dense.bias.dtype is torch.float64
