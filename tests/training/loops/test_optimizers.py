"""Optimisers and schedules: each descends, and its rate goes where its name says."""

import sys

import pytest
import torch
from torch import nn

from stylewright.training.loops.optimizers import OPTIMIZERS, SCHEDULES, build_schedule, learning_rate_of

RATES = {"adam": 0.05, "adamw": 0.05, "prodigy": 1.0, "schedule-free": 0.05}


def bowl() -> tuple[list[nn.Parameter], torch.Tensor]:
    """Two parameters and where they should go."""
    source = torch.Generator().manual_seed(0)
    start = [nn.Parameter(torch.randn(3, 2, generator=source)), nn.Parameter(torch.zeros(4))]
    return start, torch.ones(())


@pytest.mark.parametrize("name", RATES)
def test_each_descends(name, capsys):
    parameters, goal = bowl()
    optimizer = OPTIMIZERS[name]([{"params": parameters}], RATES[name], 0.01, 5)

    def loss():
        return sum((p - goal).square().sum() for p in parameters)

    first = loss().item()
    for _ in range(120):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.1 * first
    assert learning_rate_of(optimizer) > 0
    assert capsys.readouterr().out == ""


def test_adam_is_torchs_adam_bit_for_bit():
    ours, theirs = bowl()[0], bowl()[0]
    first = OPTIMIZERS["adam"]([{"params": ours}], 1e-2, 0.0, 0)
    second = torch.optim.Adam(theirs, lr=1e-2, betas=(0.9, 0.999), fused=True)
    for parameters, optimizer in ((ours, first), (theirs, second)):
        for _ in range(3):
            optimizer.zero_grad()
            sum((p - 1).square().sum() for p in parameters).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_missing_library_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        OPTIMIZERS["adamw-8bit"]([{"params": bowl()[0]}], 1e-4, 0.0, 0)


def rates(name: str, steps: int, warm_up: int) -> list[float]:
    optimizer = torch.optim.Adam(bowl()[0], lr=2.0)
    schedule = build_schedule(name, optimizer, steps, warm_up)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_to_the_full_rate_and_no_step_is_wasted(name):
    found = rates(name, steps=20, warm_up=5)
    assert all(left < right for left, right in zip(found[:5], found[1:6], strict=True))
    assert found[5] == 2.0 == max(found)
    assert min(found) > 0


def test_schedules_go_where_their_names_say():
    assert rates("constant", 10, 0) == [2.0] * 10
    assert rates("linear", 10, 0) == pytest.approx([2 - 0.2 * step for step in range(10)])
    cosine = rates("cosine", 10, 0)
    assert cosine[5] == pytest.approx(1.0)
    assert all(left > right for left, right in zip(cosine, cosine[1:], strict=False))
