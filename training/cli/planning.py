"""The plan of a run of ``stylewright train``: told on stderr, and kept in the run's folder."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..processes import Processes

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..hosts.host import Host
    from ..loops.config import TrainConfig
    from ..loops.plan import Budget, Plan
    from ..loops.saving import Saving
    from ..loops.train import TrainResult


def train_within_memory(
    host: "Host",
    dataset: "Dataset",
    options: "TrainConfig",
    folder: Path,
    train: Callable[["Saving"], "TrainResult"],
    processes: Processes,
) -> "TrainResult":
    """Plans, and calls ``train`` with the plan's setting; where memory runs out, once more with the next cheaper one.

    A model in parts is not planned for: to measure one, all processes would have to agree at every turn.
    DoesNotFit where nothing would do, and the options leave it to the plan. TrainingError where both ran out.
    """
    import torch

    from ..loops.attempts import cheaper_plan, told, twice
    from ..loops.plan import DoesNotFit
    from ..loops.planner import Planner
    from ..loops.saving import as_configured
    from ..loops.share import share_of

    if processes.sharded:
        return train(as_configured(options))
    share = share_of(options, processes)
    options = replace(options, batch_size=share.batch_size, accumulation=len(share.passes))
    planner = Planner(
        host.denoiser,
        dataset,
        options,
        device=host.device,
        latents_per_token=(host.pixels_per_token // host.pixels_per_latent) ** 2,
        conditioning=host.training_conditioning,
    )
    budget = budget_of(host)
    with processes.together():
        plan, survey = planner.survey(budget)

    def say(text: str) -> None:
        if processes.writes:
            typer.echo(f"stylewright: {text}", err=True)

    def attempt(plan: "Plan") -> "TrainResult":
        with processes.together():
            plan = planner.rehearse(plan, survey, budget)
            if processes.writes:
                plan.to_file(folder / "plan.json")
            if not plan.fits and options.memory == "automatic":
                raise DoesNotFit(f"{plan.sentence()}. (--memory 'as set' trains all the same.)")
        say(plan.sentence())
        return train(plan.saving)

    def cheaper(failure: str) -> "Plan":
        with processes.together():
            found = cheaper_plan(plan, host.denoiser.module, torch.device(host.device), failure)
        say(told(plan, found, failure))
        return found

    return twice(plan, attempt, cheaper, free_memory)


def free_memory() -> None:
    """Gives back what an attempt has left in caches and cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def budget_of(host: "Host") -> "Budget":
    """On CUDA what is free now, the loaded model included; elsewhere nothing is known."""
    import torch

    from ..loops.plan import Budget
    from ..memory import nbytes

    model, device = nbytes(host.denoiser.module.parameters()), torch.device(host.device)
    if device.type != "cuda":
        return Budget(model, None)
    return Budget(model, torch.cuda.mem_get_info(device)[0] + model, may_offload=True)
