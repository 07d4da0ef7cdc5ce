"""Memory that runs out: one cheaper attempt, and errors that say what was tried."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from stylewright.training.errors import TrainingError
from stylewright.training.loops.attempts import cheaper_plan, told, twice
from stylewright.training.loops.plan import Plan
from stylewright.training.loops.saving import ALL, Saving


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(2, 1, 2) for _ in range(3))


PLAN = Plan(model=1, adapter=1, activations=1, available=None, saving=Saving(), blocks=3)
LESS = replace(PLAN, saving=Saving(frozenset({ALL})))
LEAST = replace(PLAN, saving=Saving(frozenset({ALL}), offload=True))
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FULL = torch.OutOfMemoryError("out of memory\nwith a trace")


def attempted(*errors):
    """What is tried, where the attempts end in these errors."""
    tried, left = [], list(errors)

    def attempt(plan):
        tried.append(plan)
        if left:
            raise left.pop(0)
        return "trained"

    def cheaper(failure):
        tried.append(failure)
        return LESS

    return tried, lambda: twice(PLAN, attempt, cheaper, lambda: tried.append("cleared"))


def test_what_works_is_tried_once():
    tried, run = attempted()
    assert run() == "trained" and tried == [PLAN]


@pytest.mark.parametrize(
    ("error", "failure"),
    [(FULL, "out of memory"), (MemoryError(), "MemoryError"), (RuntimeError("not enough memory"), "not enough memory")],
)
def test_a_second_attempt_takes_less_after_a_clearing(error, failure):
    tried, run = attempted(error)
    assert run() == "trained" and tried == [PLAN, failure, "cleared", LESS]


def test_there_is_no_third():
    tried, run = attempted(FULL, FULL)
    with pytest.raises(TrainingError, match="with nothing recomputed and then with 3 of 3 blocks recomputed"):
        run()
    assert tried[-1] == LESS


@pytest.mark.parametrize("errors", [(RuntimeError("of another kind"),), (FULL, ValueError("of another kind"))])
def test_other_errors_are_passed_on(errors):
    with pytest.raises((RuntimeError, ValueError), match="of another kind"):
        attempted(*errors)[1]()


def test_plans_get_cheaper_until_nothing_is_left():
    module = Blocks()
    assert cheaper_plan(PLAN, module, CPU, "why") == LESS
    assert cheaper_plan(LESS, module, CUDA, "why") == LEAST
    for plan, device in ((LESS, CPU), (LEAST, CUDA)):
        with pytest.raises(TrainingError, match=r"nothing is left to save \(why\)"):
            cheaper_plan(plan, module, device, "why")
    assert cheaper_plan(LEAST, module, CUDA, "why", may_stream=True) == LEAST
    assert told(PLAN, LESS, "why") == (
        "memory ran out (why) with nothing recomputed; continues with 3 of 3 blocks recomputed"
    )
