"""FineStyle's bottleneck: y + W_up GELU(W_down y), the identity at the start, on keys and values alone."""

import math

import pytest
import torch
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.keys_values import own_places, rows_of
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.bottleneck import bottleneck


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("channels", [-1, 1])
def test_the_formula(channels):
    y, down, up = torch.randn(2, 5, 5), torch.randn(3, 5), torch.randn(5, 3)
    rows = y.movedim(channels, -1)
    expected = (gelu(rows @ down.T) @ up.T).movedim(-1, channels)
    torch.testing.assert_close(bottleneck(y, down, up, channels), expected)
    assert bottleneck(y.bfloat16(), down, up).dtype == torch.bfloat16


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([nn.ModuleDict({"txt_attn": nn.ModuleDict({"qkv": nn.Linear(8, 24)})})])
        self.requires_grad_(False)

    def forward(self, x):
        return self.double_blocks[0]["txt_attn"]["qkv"](x)


def test_two_of_them_behind_a_stacked_layer_are_as_two_alone():
    tree, x, config = Tree(), torch.randn(4, 8), AdapterConfig("bottleneck", rank=2, alpha=4.0, targets="kv_text")
    base = tree(x)
    with attached(tree, config, family="flux", seed=0) as adapter:
        assert torch.equal(tree(x), base)
        (name,) = adapter.names
        rows, optimizer = rows_of(name, 8, 24), torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(5):
            (tree(x) - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = adapter.state_dict()
        up, down = state[f"{name}.bottleneck_up"], state[f"{name}.bottleneck_down"]
        places = own_places(rows, 24, 2)
        assert not up[~places].any() and not down.T[~places].any() and up[places].all() and down.T[places].all()
        found, expected = tree(x), base.clone()
        for number, part in enumerate(rows):
            own, columns = slice(part.start, part.stop), slice(2 * number, 2 * number + 2)
            y = base[:, own]
            expected[:, own] = y + 2.0 * gelu(y @ down[columns, own].T) @ up[own, columns].T
        torch.testing.assert_close(found, expected)
        assert torch.equal(found[:, :8], base[:, :8])  # queries
    assert torch.equal(tree(x), base)


def test_the_laws_of_the_start():
    tree = Tree()
    with attached(tree, AdapterConfig("bottleneck", rank=4, targets=(r"qkv",)), family="flux", seed=0) as adapter:
        state = adapter.state_dict()
    (down,) = (tensor for name, tensor in state.items() if name.endswith("down"))
    (up,) = (tensor for name, tensor in state.items() if name.endswith("up"))
    assert not up.any() and 0.01 < float(down.std()) < 0.03 and float(down.abs().max()) <= 0.04


class Widths(nn.Module):
    """Two layers of one width and one of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.requires_grad_(False)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


SHARED = AdapterConfig("bottleneck", rank=2, alpha=6.0, targets=("a", "b", "c"), shared_bottleneck=True)


def trained(tree, x, adapter, steps=5):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        (tree(x) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_layers_of_a_width_share_their_projections():
    """y + s (W_up + u_l) GELU((W_down + d_l) y), each vector spread along its matrix's inputs."""
    tree, x = Widths(), torch.randn(3, 5)
    base = tree(x)
    with attached(tree, SHARED, family="other", seed=0) as adapter:
        assert torch.equal(tree(x), base)
        trained(tree, x, adapter)
        state, found = adapter.state_dict(), tree(x)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    vectors = {f"{n}.bottleneck_d": (w,) for n, w in (("a", 6), ("b", 6), ("c", 4))}
    vectors |= {f"{n}.bottleneck_u": (2,) for n in "abc"}
    pairs = {f"{n}.bottleneck_shared_down": (2, w) for n, w in (("a", 6), ("c", 4))}
    pairs |= {f"{n}.bottleneck_shared_up": (w, 2) for n, w in (("a", 6), ("c", 4))}
    assert shapes == vectors | pairs
    for name, bearer in (("a", "a"), ("b", "a"), ("c", "c")):
        y = tree.get_submodule(name)(x)
        down = state[f"{bearer}.bottleneck_shared_down"] + state[f"{name}.bottleneck_d"][None]
        up = state[f"{bearer}.bottleneck_shared_up"] + state[f"{name}.bottleneck_u"][None]
        x = y + 3.0 * gelu(y @ down.T) @ up.T
    torch.testing.assert_close(found, x)
    assert all(tensor.any() for tensor in state.values())  # all of them learned, and moved from zero


def test_peft_saves_and_loads_what_is_shared():
    from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    from stylewright.training.adapters.bottleneck_peft import BottleneckConfig

    tree, x = Widths(), torch.randn(3, 5)
    with attached(tree, SHARED, family="other", seed=0) as adapter:
        trained(tree, x, adapter)
        state, expected = adapter.state_dict(), tree(x)
    config = BottleneckConfig(r=2, alpha=6.0, target_modules=["a", "b", "c"], shared=True)
    assert BottleneckConfig(**config.to_dict()).to_dict() == config.to_dict()
    inject_adapter_in_model(config, tree)
    set_peft_model_state_dict(tree, state)
    torch.testing.assert_close(tree(x), expected)
    assert get_peft_model_state_dict(tree).keys() == state.keys()


def test_a_stacked_layer_shares_with_its_own_parts():
    """Keys and values in one layer: one pair for both, as where each has a layer, and vectors for each."""
    config = AdapterConfig("bottleneck", rank=2, alpha=4.0, targets="kv_text", shared_bottleneck=True)
    tree, x = Tree(), torch.randn(4, 8)
    base = tree(x)
    with attached(tree, config, family="flux", seed=0) as adapter:
        (name,) = adapter.names
        trained(tree, x, adapter)
        state, found = adapter.state_dict(), tree(x)
    down, up, d, u = (state[f"{name}.bottleneck_{part}"] for part in ("shared_down", "shared_up", "d", "u"))
    assert (down.shape, up.shape, d.shape, u.shape) == ((2, 8), (8, 2), (24,), (4,))
    expected = base.clone()
    for number, part in enumerate(rows_of(name, 8, 24)):
        own = slice(part.start, part.stop)
        inner = gelu(base[:, own] @ (down + d[own]).T)
        expected[:, own] += 2.0 * inner @ (up + u[2 * number : 2 * number + 2]).T
    torch.testing.assert_close(found, expected)
    assert not d[:8].any() and torch.equal(found[:, :8], base[:, :8])


def test_an_option_of_another_method_is_refused():
    for options in ({"branches": 8}, {"injection": "f1"}, {"shared_bottleneck": True}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} has no effect on dora"):
            AdapterConfig("dora", **options)
    with pytest.raises(ValueError, match=r"branches has no effect on bottleneck: .* the method styleinject"):
        AdapterConfig("bottleneck", branches=1)
    AdapterConfig("styleinject", branches=1, injection="f1")
