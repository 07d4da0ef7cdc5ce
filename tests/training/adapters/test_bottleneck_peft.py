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
