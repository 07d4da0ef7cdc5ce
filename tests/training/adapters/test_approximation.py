"""A LoRA for a StyleInject adapter: exact where there is an exact one, nearest elsewhere, and its loss as it is."""

import pytest
import torch
from torch import nn

from stylewright.training.adapters.approximation import approximate, reduced_rank
from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_fit_is_the_best_of_its_rank():
    x, weight = random(300, 8).double(), random(6, 8, seed=1).double()
    y = x @ weight.T
    a, b = reduced_rank(x, y, 6, ridge=1e-12)
    torch.testing.assert_close(b @ a, weight)
    a, b = reduced_rank(x, y, 2, ridge=1e-12)
    assert a.shape == (2, 8) and b.shape == (6, 2)
    expected = torch.linalg.svdvals(y)[2:].square().sum()  # Eckart and Young, for the fitted values
    torch.testing.assert_close((y - x @ a.T @ b.T).square().sum(), expected)
    wide = random(300, 4, seed=2).double()
    a, b = reduced_rank(wide, wide @ random(9, 4, seed=3).double().T, 3, ridge=0.1)
    assert a.shape == (3, 4) and b.shape == (9, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.to_q, self.to_k = nn.Linear(6, 10), nn.Linear(10, 4)
        self.eval().requires_grad_(False)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).mT
        return self.to_k(torch.tanh(self.to_q(tokens)))


def case(branches, injection):
    net = Net()
    config = AdapterConfig(
        "styleinject", rank=2, alpha=4.0, branches=branches, injection=injection, targets=("to_q", "to_k", "conv")
    )
    with attached(net, config, family="other", seed=0) as adapter:
        names = adapter.names
        state = {n: t + 0.3 * random(*t.shape, seed=i) for i, (n, t) in enumerate(adapter.state_dict().items())}
    pictures = random(64, 3, 16, 16, seed=7).split(2)
    return net, config, state, names, lambda: torch.cat([net(each) for each in pictures])


def test_with_one_branch_and_no_adain_it_is_the_same_adapter():
    net, config, state, names, draw = case(1, "lora")
    base = draw()
    found = approximate(net, config, state, names, draw, family="other", rank=2)
    assert found.rank == 2 and set(found.lost) == set(names)
    assert max(found.lost.values()) < 1e-3 and found.distance < 0.05
    assert torch.equal(draw(), base)
    again = approximate(net, config, state, names, draw, family="other", rank=2, room=1)  # layer by layer
    assert again.distance == pytest.approx(found.distance, rel=1e-3)


@pytest.mark.parametrize("injection", ["lora", "f2c", "f1"])
def test_what_is_lost_is_said_and_more_rank_loses_less(injection):
    net, config, state, names, draw = case(3, injection)
    found = [approximate(net, config, state, names, draw, family="other", rank=rank) for rank in (1, 4)]
    assert all(0 < lost <= 1 for each in found for lost in each.lost.values())
    assert sum(found[1].lost.values()) < sum(found[0].lost.values())
    assert "is lost on average" in found[1].summary() and "of rank 4" in found[1].summary()


def test_other_adapters_are_refused():
    net, _, _, _, draw = case(1, "lora")
    with pytest.raises(ValueError, match="method is lora, and this is for styleinject alone"):
        approximate(net, AdapterConfig(rank=2), {}, [], draw, family="other", rank=2)
