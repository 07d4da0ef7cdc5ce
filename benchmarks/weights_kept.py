"""Peak memory of a training step over weights that are cast in every call: with what keeps copies away, and without.

The small FLUX of training_step.py in ComfyUI, its weights in float8 and its arithmetic in bfloat16, one step of a LoRA
with no gradient checkpointing. ``with`` is what the trainer does (training/frozen.py); ``without`` leaves the casts to
torch, whose backward pass keeps each. The numbers are bytes of tensors beyond the loaded model, the same in every run.

    COMFYUI_PATH=… python benchmarks/weights_kept.py
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from comfyui import open_comfyui, why_absent
from comfyui_models import comfyui_model
from contenders import Encoder, Task
from package import load_package

MEGABYTE = 2**20


def main() -> None:
    reason = why_absent()
    if reason:
        raise SystemExit(f"this needs ComfyUI: {reason}")
    logging.disable(logging.WARNING)
    open_comfyui(Path(tempfile.mkdtemp(prefix="stylewright-benchmark-")), "cpu")
    load_package()
    task = Task(1, 8, False, "cpu")
    model = in_float8(comfyui_model("flux"))
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    peaks = {"with": peak(model, task)}
    with without_the_mechanism():
        peaks["without"] = peak(model, task)
    print(f"weights: {weights / MEGABYTE:.1f} MB in float8, {2 * weights / MEGABYTE:.1f} MB in bfloat16")
    for name, size in peaks.items():
        print(f"{name:8} {size / MEGABYTE:8.1f} MB")


def in_float8(model: Any) -> Any:
    """The same model, stored in float8 and computing in bfloat16, as ComfyUI's loader makes it when asked to."""
    import comfy.model_patcher

    before, cpu = model.model.model_config, torch.device("cpu")
    config = type(before)({**before.unet_config, "dtype": torch.float8_e4m3fn})
    config.set_inference_dtype(torch.float8_e4m3fn, torch.bfloat16)
    with torch.inference_mode():
        made = config.get_model({}, "", device=cpu).requires_grad_(False)
        made.load_state_dict(model.model.state_dict())
    return comfy.model_patcher.ModelPatcher(made, cpu, cpu)


def peak(model: Any, task: Task) -> int:
    """The most bytes of tensors at once in one step."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.gradients import differentiable
    from stylewright.training.memory import Footprint

    latents, context, pooled = task.inputs
    prompts = PromptTable(Encoder(context, pooled))
    with torch.inference_mode(), training_session(model):
        denoiser, rows = ComfyDenoiser(model, prompts), prompts.encode(["0"])
        config = AdapterConfig(rank=task.rank)
        with (
            attached(denoiser.module, config, family="flux", seed=0),
            differentiable(denoiser.module),
            Footprint() as memory,
        ):
            denoiser(latents[:1].clone(), torch.zeros(1), rows).square().mean().backward()
    return memory.peak


@contextmanager
def without_the_mechanism() -> Iterator[None]:
    from stylewright.nodes.bridge import session
    from stylewright.training.adapters import attach

    modules: tuple[Any, ...] = (session, attach)
    before = [module.frozen_products for module in modules]
    for module in modules:
        module.frozen_products = lambda *args: nullcontext()
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.frozen_products = function


if __name__ == "__main__":
    main()
