"""LoHa and LoKr without their matrices: the same numbers, and less that is kept."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from stylewright.training.adapters import attach
from stylewright.training.adapters.methods import AdapterConfig

SIDE = 64


def step(method, dtype=torch.float32):
    """Gradients of one adapter on two layers, and the shapes that autograd kept."""
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE), nn.Conv2d(1, 4, 3, padding=1))
        x = torch.randn(3, 5, SIDE, requires_grad=True)
    net.requires_grad_(False)
    with attach.attached(
        net, AdapterConfig(method, rank=2, targets=("0", "1", "2")), family="other", seed=0
    ) as adapter:
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                parameter.normal_(generator=torch.Generator().manual_seed(index))
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            y = net[2](net[1](net[0](x))[:, None])
        y.float().square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in adapter.parameters())], kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_the_numbers_are_pefts_and_no_matrix_is_kept(method, dtype, monkeypatch):
    found, kept = step(method, dtype)
    monkeypatch.setattr(attach, "recomputed_deltas", lambda layers: nullcontext())
    wanted, before = step(method, dtype)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    matrices = [shape for shape in before if shape == (SIDE, SIDE)]
    # The stored weights of the layers are in both, where they need no cast.
    assert kept.count((SIDE, SIDE)) <= len(matrices) - 2
