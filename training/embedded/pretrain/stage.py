"""What the stages of pre-training share: optimisers, an average of the weights, and a loop that resumes."""

import bisect
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from ...errors import NonFiniteLoss
from ...formats.state import load_state, save_state

logger = logging.getLogger(__name__)


class Flattened(nn.Module):
    """A convolution kernel seen as the matrix (out, in * h * w), the shape that Muon works on."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.shape = kernel.shape[1:]

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, self.shape)

    def right_inverse(self, kernel: Tensor) -> Tensor:
        return kernel.flatten(1)


def flatten_kernels(module: nn.Module) -> None:
    """Lets the inner convolutions of ``module`` be optimised as matrices."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels:
            parametrize.register_parametrization(layer, "weight", Flattened(layer.weight))


def unflatten_kernels(module: nn.Module) -> None:
    for layer in module.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")


def optimisers(
    named: Iterable[tuple[str, nn.Parameter]], is_hidden: Callable[[str], bool], lr: float
) -> list[Optimizer]:
    """Muon for the hidden matrices (Jordan et al. 2024), AdamW for everything else."""
    named = list(named)
    hidden = [p for name, p in named if p.ndim == 2 and is_hidden(name)]
    rest = [p for name, p in named if not (p.ndim == 2 and is_hidden(name))]
    return [
        Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_steps=4),
        AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """Exponential average of the weights, short at first so that the initial weights are soon forgotten."""

    def average(averages: Any, current: Any, updates: Any) -> None:
        n = int(updates)
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(module, multi_avg_fn=average)


def trapezoid(steps: int, warm_up: int, decay_from: float = 0.5) -> Callable[[int], float]:
    """Learning-rate factor: linear warm-up, constant, linear decay to zero over the last part."""
    start = decay_from * steps
    return lambda step: min((step + 1) / warm_up, 1.0, max(0.0, (steps - step) / (steps - start)))


Cycle = tuple[int, float]  # steps, peak of the learning-rate factor


def restarts(cycles: Sequence[Cycle], warm_up: int = 150) -> Callable[[int], float]:
    """Learning-rate factor: one trapezoid after the other."""
    ends = list(itertools.accumulate(steps for steps, _ in cycles))

    def factor(step: int) -> float:
        number = min(bisect.bisect_right(ends, step), len(cycles) - 1)
        steps, peak = cycles[number]
        return peak * trapezoid(steps, warm_up)(step - ends[number] + steps)

    return factor


def run(
    checkpoint: Path,
    step: Callable[[int], Tensor],
    steps: int,
    optimizers: list[Optimizer],
    schedule: Callable[[int], float],
    parts: Mapping[str, Any],  # whatever has state_dict and load_state_dict
    *,
    save_every: int = 500,  # steps
    report_every: int = 100,  # steps
    evaluate: Callable[[int], str] | None = None,  # called at each save
) -> None:
    """Runs ``step(i)``, which returns a loss after backward, to the end of ``steps``, from the checkpoint if any.

    NonFiniteLoss where the loss became NaN or infinite; the checkpoint is then an earlier, sound one.
    """
    schedulers = [LambdaLR(optimizer, schedule) for optimizer in optimizers]
    everything: dict[str, Any] = dict(parts)
    everything |= {f"optimizer{i}": part for i, part in enumerate(optimizers)}
    everything |= {f"schedule{i}": part for i, part in enumerate(schedulers)}
    start = _resume(checkpoint, everything)
    began, losses = time.monotonic(), []
    for i in range(start, steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(step(i).detach())
        for part in (*optimizers, *schedulers):
            part.step()
        reporting = (i + 1) % report_every == 0
        saving = (i + 1) % save_every == 0 or i + 1 == steps
        if reporting or saving:
            loss = _finite_mean(losses, f"{checkpoint.stem}, before step {i + 1}")
        if reporting:
            losses.clear()
            pace = (time.monotonic() - began) / (i + 1 - start)
            logger.info("%s: step %d of %d, loss %.4f, %.3f s a step", checkpoint.stem, i + 1, steps, loss, pace)
        if saving:
            save_state(checkpoint, {"step": i + 1} | {name: part.state_dict() for name, part in everything.items()})
            if evaluate is not None:
                logger.info("%s: step %d, %s", checkpoint.stem, i + 1, evaluate(i + 1))


def _finite_mean(losses: list[Tensor], where: str) -> float:
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):
        raise NonFiniteLoss(f"{where}: the loss is {mean}")
    return mean


def _resume(checkpoint: Path, parts: Mapping[str, Any]) -> int:
    if not checkpoint.exists():
        return 0
    state = load_state(checkpoint)
    for name, part in parts.items():
        part.load_state_dict(state[name])
        if isinstance(part, Optimizer):
            _lay_out_as_parameters(part)
    logger.info("%s: continues at step %d", checkpoint.stem, state["step"])
    return state["step"]


def _lay_out_as_parameters(optimizer: Optimizer) -> None:
    """Gives loaded state the memory layout of its parameters.

    Files hold tensors row by row; fused AdamW walks through a parameter and its averages side by side in memory, and
    would pair the wrong elements where the parameter is laid out channels last.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
