"""A run that runs out of memory all the same: once more, with less, from its last complete step on."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from ..errors import TrainingError
from ..memory import is_out_of_memory
from .plan import Plan

Result = TypeVar("Result")

ADVICE = (
    "A smaller batch_size, resolution or rank needs less; what was trained so far is kept, and the run can be continued"
)


def twice(
    plan: Plan, attempt: Callable[[Plan], Result], cheaper: Callable[[str], Plan], clear: Callable[[], None]
) -> Result:
    """What ``attempt`` gives for the plan, or where memory runs out for the one that ``cheaper`` then draws up.

    ``cheaper`` gets what was said, and raises TrainingError where nothing is left to save. ``clear`` gives back what
    the first attempt has left. TrainingError where both ran out; whatever else is raised is passed on.
    """
    try:
        return attempt(plan)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = said(error)
    following = cheaper(failure)
    clear()  # outside of the handler, whose traceback holds the tensors of the attempt
    try:
        return attempt(following)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"there was not enough memory, with {plan.saving.describe(plan.blocks)} and then with "
            f"{following.saving.describe(plan.blocks)} ({failure}). {ADVICE}"
        ) from error


def cheaper_plan(
    plan: Plan, module: nn.Module, device: torch.device, failure: str, *, may_stream: bool = False
) -> Plan:
    """The plan with the next cheaper setting, or where there is none, if weights ``may_stream``, as it is.

    TrainingError where nothing is left to save.
    """
    saving = plan.saving.cheaper(module)
    if saving is not None and saving.offload and device.type == "cpu":
        saving = None  # it is the same memory
    if saving is None and not may_stream:
        raise TrainingError(
            f"there was not enough memory with {plan.saving.describe(plan.blocks)}, and nothing is left to save "
            f"({failure}). {ADVICE}"
        )
    return replace(plan, saving=saving or plan.saving)


def told(plan: Plan, cheaper: Plan, failure: str) -> str:
    """For the person who waits."""
    return (
        f"memory ran out ({failure}) with {plan.saving.describe(plan.blocks)}; continues with "
        f"{cheaper.saving.describe(plan.blocks)}"
    )


def said(error: BaseException) -> str:
    """The first line of an error, or its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
