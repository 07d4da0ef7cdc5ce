"""The plan of a run of ``stylewright train``: told on stderr, and kept in the run's folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..hosts.host import Host
    from ..loops.config import TrainConfig
    from ..loops.plan import Budget
    from ..loops.saving import Saving


def planned(host: "Host", dataset: "Dataset", options: "TrainConfig", folder: Path) -> "Saving":
    """What is done to save memory. DoesNotFit where nothing would do, and the options leave it to the plan."""
    from ..loops.plan import DoesNotFit
    from ..loops.planner import Planner

    planner = Planner(
        host.denoiser,
        dataset,
        options,
        device=host.device,
        latents_per_token=(host.pixels_per_token // host.pixels_per_latent) ** 2,
        conditioning=host.training_conditioning,
    )
    budget = budget_of(host)
    plan = planner.rehearse(*planner.survey(budget), budget)
    plan.to_file(folder / "plan.json")
    if not plan.fits and options.memory == "automatic":
        raise DoesNotFit(f"{plan.sentence()}. (--memory 'as set' trains all the same.)")
    typer.echo(f"stylewright: {plan.sentence()}", err=True)
    return plan.saving


def budget_of(host: "Host") -> "Budget":
    """On CUDA what is free now, the loaded model included; elsewhere nothing is known."""
    import torch

    from ..loops.plan import Budget
    from ..memory import nbytes

    model, device = nbytes(host.denoiser.module.parameters()), torch.device(host.device)
    if device.type != "cuda":
        return Budget(model, None)
    return Budget(model, torch.cuda.mem_get_info(device)[0] + model, may_offload=True)
