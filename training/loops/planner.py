"""Draws up a run's plan on the model itself, with an adapter that is thrown away."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..adapters.attach import attached
from ..data.dataset import Dataset
from ..denoiser import Conditioning, Denoiser
from ..frozen import frozen_products
from .config import TrainConfig
from .plan import Budget, Plan, choose, corrected, rehearsed
from .probe import Bench
from .survey import Survey, rehearse, surveyed

logger = logging.getLogger(__name__)

FEW_PASSES = 40  # a run of fewer is over before it has been timed


class Planner:
    """Plans one run. The model must be on its device, and the device otherwise as it will be."""

    def __init__(
        self,
        denoiser: Denoiser,
        dataset: Dataset,
        config: TrainConfig,
        *,
        device: torch.device | str,
        latents_per_token: int = 4,
        conditioning: Conditioning | None = None,  # entries (1, …) that every batch gets too
        longest: Conditioning | None = None,  # the row of the longest prompt; None = the one with most numbers
        smallest: int = 1,  # side of latents that the model works with
    ) -> None:
        self._denoiser, self._dataset, self._config = denoiser, dataset, config
        self._device, self._latents_per_token = torch.device(device), latents_per_token
        self._smallest = smallest
        self._conditioning = {**(longest or _longest(dataset)), **(conditioning or {})}

    def survey(self, budget: Budget) -> tuple[Plan, Survey]:
        """Measures at small sizes, and chooses what fits. Says the plan in the log."""
        room = None if budget.available is None else budget.available - budget.model
        with self._bench() as bench:
            survey = surveyed(bench, self._dataset, self._latents_per_token, room, self._smallest)
        plan = choose(survey, self._config, budget)
        logger.info("%s", plan.sentence())
        return plan, survey

    def rehearse(self, plan: Plan, survey: Survey, budget: Budget) -> Plan:
        """The plan with a whole batch's time and memory, or another one where that does not fit.

        A short run is not rehearsed.
        """
        config = self._config
        if not plan.fits or config.steps * config.accumulation < FEW_PASSES:
            return plan
        shape = (config.batch_size, *survey.largest)
        with self._bench() as bench:
            rehearsal = rehearse(bench, shape, plan.saving)
            plan = rehearsed(plan, survey, config, rehearsal)
            if not plan.fits:
                survey = corrected(survey, config, rehearsal)
                plan = choose(survey, config, budget)
                if plan.fits:
                    plan = rehearsed(plan, survey, config, rehearse(bench, shape, plan.saving))
        logger.info("%s", plan.sentence())
        return plan

    @contextmanager
    def _bench(self) -> Iterator[Bench]:
        config, denoiser, examples = self._config, self._denoiser, self._dataset.examples
        with (
            frozen_products(denoiser.module),
            attached(
                denoiser.module, config.adapter, family=denoiser.family, seed=config.seed, device=self._device
            ) as adapter,
        ):
            yield Bench(
                denoiser,
                adapter,
                config,
                self._conditioning,
                channels=examples[0].latent.shape[0],
                masked=any(example.mask is not None for example in examples),
                device=self._device,
            )


def _longest(dataset: Dataset) -> Conditioning:
    rows = (example.conditioning for example in dataset.examples)
    return max(rows, key=lambda row: sum(tensor.numel() for tensor in row.values()))
