"""A run's memory inside ComfyUI: what leaves the device, what ComfyUI may load, and what happens when it runs out.

ComfyUI decides where weights are: by its flags (--highvram, --lowvram, --novram, --cpu), its partial loading and its
dynamic VRAM. It is told how much room training needs beside them, and it streams what does not fit.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import torch

from ...training.data.dataset import Dataset
from ...training.denoiser import Conditioning
from ...training.hosts.host import Host
from ...training.loops.attempts import cheaper_plan, told, twice
from ...training.loops.config import TrainConfig
from ...training.loops.plan import MARGIN, Budget, DoesNotFit, Plan, size
from ...training.loops.planner import Planner
from ...training.loops.saving import Saving
from ...training.loops.survey import Survey
from .denoiser import ComfyDenoiser
from .families import latents_per_token, smallest_side
from .previews import TrainingProgress
from .session import training_session
from .text_encoders import activation_bytes, describe

logger = logging.getLogger(__name__)

# Of what sampling needs, for the small passes of a survey with everything kept.
SURVEY_FACTOR = 4
RETRY_FACTOR = 1.5  # of the planned room, after it proved too small

Patcher = comfy.model_patcher.ModelPatcher
Result = TypeVar("Result")


@dataclass(frozen=True)
class Training:
    """A run that is to be planned and trained."""

    model: Patcher
    clip: comfy.sd.CLIP | None
    host: Host
    dataset: Dataset
    config: TrainConfig
    folder: Path
    progress: TrainingProgress
    kept_prompts: int | None = None  # how many stay encoded, the others being encoded as needed; None = all are

    @property
    def text_bytes(self) -> int:
        """What text encoders that are trained, or asked as needed, take of the device, beside the model."""
        if self.clip is None or (not self.host.text_encoders and self.kept_prompts is None):
            return 0
        if not self.host.text_encoders:
            return int(self.clip.patcher.model_size())
        prompts = activation_bytes(self.clip, self.config.gradient_checkpointing)
        return int(self.clip.patcher.model_size()) + self.config.batch_size * prompts

    @contextmanager
    def session(self, room: float) -> Iterator[None]:
        """A training session; with the text encoders where an adapter comes on them, or where they are asked in it."""
        if self.clip is None or not self.text_bytes:
            with training_session(self.model, memory_required=room):
                yield
            return
        denoiser = self.host.denoiser
        assert isinstance(denoiser, ComfyDenoiser), "comfy_host makes one"
        patcher, prompts = self.clip.patcher, denoiser.prompts
        if self.host.text_encoders:
            logger.info("%s trained, too", describe(self.clip))
        answering = prompts.asked_anew() if self.kept_prompts is None else prompts.asked_as_needed(self.kept_prompts)
        with training_session(self.model, beside=[patcher], memory_required=room + self.text_bytes), answering:
            yield


def train_within_memory(training: Training, check: Callable[[], None], train: Callable[[Saving], Result]) -> Result:
    """Plans, then calls ``train`` with the plan's setting inside a training session.

    ``check`` is called first, in a session too. Where memory runs out all the same, the next cheaper setting is tried
    once, from the last complete step on. DoesNotFit where no setting would do; TrainingError where both failed.
    """
    planner, plan, survey, budget = _planned(training, check)

    def attempt(chosen: Plan) -> Result:
        factor = MARGIN if chosen is plan else RETRY_FACTOR
        with training.session(factor * plan.beyond_the_model):
            chosen = planner.rehearse(chosen, survey, budget)
            _announce(training, chosen)
            before = _start_counting(training.model)
            result = train(chosen.saving)
            _compare(training.model, chosen, before)
            return result

    def cheaper(failure: str) -> Plan:
        device = training.model.load_device
        found = cheaper_plan(
            plan, training.host.denoiser.module, device, failure, may_stream=may_stream(training.model)
        )
        text = told(plan, found, failure)
        logger.warning("%s", text)
        training.progress.noted(text)
        return found

    return twice(plan, attempt, cheaper, free_memory)


def _planned(training: Training, check: Callable[[], None]) -> tuple[Planner, Plan, Survey, Budget]:
    model, host, config = training.model, training.host, training.config
    planner = Planner(
        host.denoiser,
        training.dataset,
        config,
        device=host.device,
        latents_per_token=latents_per_token(model) ** 2,
        conditioning=host.training_conditioning,
        longest=_longest(training),
        smallest=smallest_side(model),
    )
    latent = max((example.latent for example in training.dataset.examples), key=torch.numel)
    room = SURVEY_FACTOR * model.memory_required([config.batch_size, *latent.shape])
    with training_session(model, memory_required=room):
        check()
        training.progress.planned("plan: a few small passes are measured")
        budget = budget_of(model)
        if budget.available is not None:
            budget = replace(budget, available=budget.available - training.text_bytes)
        plan, survey = planner.survey(budget)
    if not plan.fits and config.memory == "automatic":
        plan.to_file(training.folder / "plan.json")
        raise DoesNotFit(f"{plan.sentence()}. (memory 'as set' trains all the same.)")
    return planner, plan, survey, budget


def _longest(training: Training) -> Conditioning:
    """The row of the prompt with most tokens."""
    denoiser = training.host.denoiser
    assert isinstance(denoiser, ComfyDenoiser)
    return denoiser.longest([example.conditioning for example in training.dataset.examples])


def _announce(training: Training, plan: Plan) -> None:
    if not plan.fits:
        logger.warning("%s", plan.sentence())
    plan.to_file(training.folder / "plan.json")
    training.progress.planned(plan.sentence())


def budget_of(model: Patcher) -> Budget:
    """What there is for a run on the model's device: all but what ComfyUI keeps for others.

    Called while the model is loaded; other loaded models count as free, because ComfyUI unloads them on demand.
    """
    device = model.load_device
    on_cpu = management.is_device_cpu(device)
    weights = model.model_size() if not _never_loads(device) else model.loaded_size()
    available = management.get_free_memory(device) - (0 if on_cpu else management.extra_reserved_memory())
    if on_cpu:
        available += weights  # they are in the same memory already
    else:
        loaded = [each.model for each in management.current_loaded_models if each.device == device]
        available += sum(patcher.loaded_size() for patcher in loaded if patcher is not None)
    return Budget(int(weights), available, may_stream=may_stream(model), may_offload=not on_cpu)


def may_stream(model: Patcher) -> bool:
    """Whether ComfyUI may keep weights in CPU memory and move them for each call."""
    if management.is_device_cpu(model.load_device):
        return False
    return management.vram_state in (management.VRAMState.NORMAL_VRAM, management.VRAMState.LOW_VRAM)


def _never_loads(device: torch.device) -> bool:
    return not management.is_device_cpu(device) and management.vram_state == management.VRAMState.NO_VRAM


def leave_device(*patchers: Patcher) -> None:
    """Models go to CPU memory, as ComfyUI itself unloads them; it loads them again when they are asked for."""
    for device in {patcher.load_device for patcher in patchers}:
        if management.is_device_cpu(device):
            continue
        others = [
            loaded
            for loaded in management.current_loaded_models
            if loaded.model is not None and not any(loaded.model.is_clone(patcher) for patcher in patchers)
        ]
        with torch.inference_mode():  # their weights may be inference tensors
            management.free_memory(1e30, device, keep_loaded=others)


def free_memory() -> None:
    """Gives back what an attempt has left in caches and cycles."""
    gc.collect()
    management.soft_empty_cache()


def _start_counting(model: Patcher) -> int:
    """Bytes on the device now; its peak is counted from here on. 0 where the device does not count."""
    if model.load_device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(model.load_device)
    return torch.cuda.memory_allocated(model.load_device)


def _compare(model: Patcher, plan: Plan, before: int) -> None:
    if model.load_device.type == "cuda":
        taken = torch.cuda.max_memory_allocated(model.load_device) - before
        logger.info("memory beyond the model: %s were planned, %s were taken", size(plan.beyond_the_model), size(taken))
