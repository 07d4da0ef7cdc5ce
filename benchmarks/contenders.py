"""The contenders of training_step.py: each trains one adapter on the same small model for a number of steps.

A contender is a function of the task. It builds its model and returns a function ``train(steps)`` that runs that
many optimizer steps with everything that belongs to them; whoever calls it watches the optimizer.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfyui_models import comfyui_model
from models import KINDS, denoiser_of
from plain_loop import LEARNING_RATE, diffusers_peft
from torch import Tensor

SIDE = 32  # of the latents: 256 image tokens in a transformer

Training = Callable[[int], object]


@dataclass(frozen=True)
class Task:
    """What all do alike. The adapter's alpha is its rank, and its arithmetic is float32."""

    batch_size: int = 1
    rank: int = 8
    checkpointing: bool = False  # recompute every block
    device: str = "cpu"
    model: str = "flux"  # or "sd3", "sdxl"

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (b, c, 32, 32), context (b, n, d) and pooled vector (b, d), the same in every process."""
        kind, source = KINDS[self.model], torch.Generator().manual_seed(0)
        shapes = (kind.channels, SIDE, SIDE), kind.context, (kind.pooled,)
        return tuple(torch.randn(self.batch_size, *shape, generator=source) for shape in shapes)


def stylewright(task: Task) -> Training:
    """Our loop on diffusers' model, as ``stylewright train`` runs it."""
    denoiser = denoiser_of(KINDS[task.model], task.device, torch.float32)
    latents, context, pooled = task.inputs
    rows = [{"context": context[i : i + 1], "pooled": pooled[i : i + 1]} for i in range(task.batch_size)]
    return lambda steps: _our_loop(task, steps, denoiser, latents, rows)


def _our_loop(task: Task, steps: int, denoiser: Any, latents: Tensor, rows: list[dict[str, Tensor]]) -> object:
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.data.dataset import Dataset, Example
    from stylewright.training.loops.config import TrainConfig
    from stylewright.training.loops.train import train

    examples = [Example(str(i), latents[i], row, None, "a picture") for i, row in enumerate(rows)]
    config = TrainConfig(
        steps=steps,
        batch_size=task.batch_size,
        accumulation=1,
        learning_rate=LEARNING_RATE,
        optimizer="adamw",
        gradient_checkpointing=task.checkpointing,
        adapter=AdapterConfig(rank=task.rank, targets="all"),
    )
    return train(
        denoiser, Dataset(examples, rows[0]), config, run_dir=None, report=lambda event: None, device=task.device
    )


# --------------------------------------------------------------------------------------------------------------------
# The original layout, ComfyUI's: q, k and v in one where the family has it so


def comfyui_native(task: Task, bypass: bool = False) -> Training:
    """ComfyUI's TrainLoraNode with its defaults, as far as they are not the task's.

    It adapts every weight, convolution, norm and bias, and has no choice of it. It cannot train FLUX without
    recomputing, for the blocks add in place: by default it recomputes the whole model at once (depth 1). SD3 and SDXL
    it trains without, which is faster. With the task's checkpointing, it recomputes what is at depth 2: every block
    of FLUX and SD3, every layer of SDXL's blocks. With ``bypass`` it leaves weights of layers as they are, and adds to
    what the layers answer.
    """
    import nodes  # noqa: F401  ComfyUI's, which its extras expect to be loaded
    from comfy_extras.nodes_train import TrainLoraNode

    model = comfyui_model(task.model)
    model.cached_patcher_init = (_second_model, (task,))
    latents, context, pooled = task.inputs
    positive = [[context[i : i + 1], {"pooled_output": pooled[i : i + 1]}] for i in range(task.batch_size)]

    def train(steps: int) -> object:
        with torch.inference_mode():  # as the executor runs every node
            return TrainLoraNode.execute(
                model=[model],
                latents=[{"samples": latents}],
                positive=[positive],
                batch_size=[task.batch_size],
                steps=[steps],
                grad_accumulation_steps=[1],
                learning_rate=[LEARNING_RATE],
                rank=[task.rank],
                optimizer=["AdamW"],
                loss_function=["MSE"],
                seed=[0],
                training_dtype=["fp32"],
                lora_dtype=["fp32"],
                quantized_backward=[False],
                algorithm=["LoRA"],
                gradient_checkpointing=[task.checkpointing or task.model == "flux"],
                checkpoint_depth=[2 if task.checkpointing else 1],
                offloading=[False],
                existing_lora=["[None]"],
                bucket_mode=[False],
                bypass_mode=[bypass],
            )

    return train


def _second_model(task: Task, disable_dynamic: bool = False) -> Any:
    """The copy that the node trains on, outside of inference mode as the node makes it.

    It is not counted: it is the model, and no cost of a step.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return comfyui_model(task.model, inference=False)


def stylewright_comfyui(task: Task) -> Training:
    """Our loop on ComfyUI's model, through the bridge that the trainer node uses."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session

    model = comfyui_model(task.model)
    latents, context, pooled = task.inputs
    prompts = PromptTable(Encoder(context, pooled))

    def train(steps: int) -> object:
        with torch.inference_mode(), training_session(model):
            rows = [prompts.encode([str(i)]) for i in range(task.batch_size)]
            return _our_loop(task, steps, ComfyDenoiser(model, prompts), latents, rows)

    return train


class Encoder:
    """Stands for a CLIP: the prompt "0" means the first row, and so on."""

    def __init__(self, context: Tensor, pooled: Tensor) -> None:
        self._context, self._pooled = context, pooled

    def tokenize(self, text: str) -> int:
        return int(text)

    def encode_from_tokens_scheduled(self, row: int, show_pbar: bool = True) -> list:
        return [[self._context[row : row + 1], {"pooled_output": self._pooled[row : row + 1]}]]


@dataclass(frozen=True)
class Contender:
    build: Callable[[Task], Training]
    in_comfyui: bool


CONTENDERS = {
    "stylewright": Contender(stylewright, in_comfyui=False),
    "diffusers-peft": Contender(diffusers_peft, in_comfyui=False),
    "stylewright-comfyui": Contender(stylewright_comfyui, in_comfyui=True),
    "comfyui-native": Contender(comfyui_native, in_comfyui=True),
    "comfyui-native-bypass": Contender(partial(comfyui_native, bypass=True), in_comfyui=True),
}


def open_contender(name: str, task: Task) -> Training:
    """Builds a contender in this process."""
    from comfyui import open_comfyui
    from package import load_package

    logging.disable(logging.WARNING)
    contender = CONTENDERS[name]
    if contender.in_comfyui:
        open_comfyui(Path(tempfile.mkdtemp(prefix="stylewright-benchmark-")), task.device)
        import comfy.utils

        comfy.utils.PROGRESS_BAR_ENABLED = False
    load_package()
    return contender.build(task)
