"""Optimisers and learning-rate schedules, all from libraries, by the names that a configuration uses.

Each optimiser is a function ``(groups, learning_rate, weight_decay, warm_up) -> Optimizer`` of groups of parameters,
some of which may state another rate (``lr``); only schedule-free does its warm-up itself. Each schedule is a function
of the share of the run that is done, in [0, 1], to a factor of the learning rate.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Group = dict[str, Any]  # "params", a list of parameters, and "lr" where the rate is another one
BETAS = (0.9, 0.999)
# Prodigy multiplies its own estimate by the learning rate: a value below this is one that was meant for Adam.
SMALLEST_PRODIGY_RATE = 0.01


def adam(groups: list[Group], learning_rate: float, weight_decay: float, warm_up: int) -> Optimizer:
    """Adam (arXiv 1412.6980), the paper's."""
    fused = _fused(groups)
    return torch.optim.Adam(groups, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=fused)


def adamw(groups: list[Group], learning_rate: float, weight_decay: float, warm_up: int) -> Optimizer:
    """AdamW (arXiv 1711.05101); without weight decay it is Adam."""
    fused = _fused(groups)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=fused)


def adamw_8bit(groups: list[Group], learning_rate: float, weight_decay: float, warm_up: int) -> Optimizer:
    """AdamW with its averages in 8 bits (arXiv 2110.02861). ValueError where bitsandbytes is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"The optimizer 'adamw-8bit' needs bitsandbytes, which cannot be imported ({error}): "
            "pip install bitsandbytes, or use 'adamw'."
        ) from error
    return AdamW8bit(groups, lr=learning_rate, betas=BETAS, weight_decay=weight_decay)


def prodigy(groups: list[Group], learning_rate: float, weight_decay: float, warm_up: int) -> Optimizer:
    """Prodigy (arXiv 2306.06101), which finds the learning rate itself. It waits for the device twice a tensor."""
    from prodigyopt import Prodigy

    optimizer = Prodigy(groups, lr=learning_rate, betas=BETAS, safeguard_warmup=warm_up > 0)
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay  # given to the constructor, it is announced on stdout
    return optimizer


def schedule_free(groups: list[Group], learning_rate: float, weight_decay: float, warm_up: int) -> Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682): an average of the weights takes the place of a schedule."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(
        groups, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, warmup_steps=warm_up
    )
    optimizer.train()
    return optimizer


def _fused(groups: Iterable[Group]) -> bool | None:
    """One kernel for all tensors, where torch has one; None leaves the choice to torch."""
    parameters: Iterator[Parameter] = (parameter for group in groups for parameter in group["params"])
    return True if all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) else None


def check_optimizer(name: str, learning_rate: float, scheduler: str, ema_decay: float) -> None:
    """ValueError for an option that the optimiser ``name`` would ignore, or that defeats it."""
    if name == "prodigy" and learning_rate < SMALLEST_PRODIGY_RATE:
        raise ValueError(
            f"Got learning_rate={learning_rate} for the optimizer 'prodigy', which multiplies its own estimate by it: "
            "expected about 1 (its usual value)."
        )
    if name == "schedule-free" and (scheduler != "constant" or ema_decay):
        raise ValueError(
            f"Got scheduler={scheduler!r} and ema_decay={ema_decay} for the optimizer 'schedule-free', which averages "
            "the weights instead: expected 'constant' and 0."
        )


def check_rates(name: str, learning_rate: float, text_encoder_learning_rate: float) -> None:
    """ValueError for two learning rates where the optimiser ``name`` has one estimate for everything."""
    if name == "prodigy" and text_encoder_learning_rate not in (0, learning_rate):
        raise ValueError(
            f"Got text_encoder_learning_rate={text_encoder_learning_rate} beside learning_rate={learning_rate} for the "
            "optimizer 'prodigy', which makes one estimate for all parameters: expected 0 or the same number."
        )


def learning_rate_of(optimizer: Optimizer) -> float:
    """The rate in use: with warm-up, schedule, and the estimate of an optimiser that makes one."""
    group = optimizer.param_groups[0]
    return float((group.get("scheduled_lr") or group["lr"]) * group.get("d", 1.0))


def constant(done: float) -> float:
    return 1.0


def linear(done: float) -> float:
    return 1.0 - done


def cosine(done: float) -> float:
    return (1.0 + math.cos(math.pi * done)) / 2


def build_schedule(name: str, optimizer: Optimizer, steps: int, warm_up: int) -> LambdaLR:
    """The schedule ``name`` over ``steps`` optimizer steps, after ``warm_up`` steps of linear growth."""

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return SCHEDULES[name](min(1.0, (step - warm_up) / (steps - warm_up)))

    return LambdaLR(optimizer, factor)


OPTIMIZERS: dict[str, Callable[[list[Group], float, float, int], Optimizer]] = {
    "adamw": adamw,
    "adam": adam,
    "adamw-8bit": adamw_8bit,
    "prodigy": prodigy,
    "schedule-free": schedule_free,
}
ELEMENTWISE = {"adamw", "adam", "schedule-free"}  # which ask nothing of all weights together: of parts, too
WARMS_UP_ITSELF = {"schedule-free"}
SWITCHED = {"schedule-free"}  # eval() puts the result into the parameters, train() what is trained

SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}
