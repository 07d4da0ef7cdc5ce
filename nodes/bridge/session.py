"""What ComfyUI needs while a model is trained inside it, in one ``with`` block."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import comfy.model_management
import comfy.model_patcher
import torch

from ...training.frozen import frozen_products
from .differentiable import exchange_inference_tensors
from .frozen_layers import ComfyWeights
from .kernels import plain_kernels


@contextmanager
def training_session(
    model: comfy.model_patcher.ModelPatcher,
    *,
    beside: Sequence[comfy.model_patcher.ModelPatcher] = (),
    memory_required: float = 0,
) -> Iterator[None]:
    """Inside, ``model`` is loaded with its patches applied, and gradients flow through its frozen weights.

    The same holds for the models ``beside`` it: text encoders that are trained, too.

    Nodes run in inference mode; ``in_training`` picks kernels that have a backward pass; the global generators are
    put back, for other nodes draw from them. ``memory_required`` is in bytes, for what training adds: of the weights,
    ComfyUI loads what fits beside it.
    """
    with torch.inference_mode():  # loading writes into weights that may be inference tensors
        # Text encoders first: what does not fit of all is streamed, and they are small.
        comfy.model_management.load_models_gpu([*beside, model], memory_required=memory_required)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(_devices(model.load_device)))
        stack.enter_context(_in_training())
        stack.enter_context(plain_kernels(model.model.diffusion_model))
        for patcher in (model, *beside):
            exchange_inference_tensors(patcher.model)
        model.pre_run()
        stack.callback(model.cleanup)
        stack.enter_context(frozen_products(model.model.diffusion_model, ComfyWeights(model.load_device)))
        for patcher in beside:
            stack.enter_context(frozen_products(patcher.model, ComfyWeights(patcher.load_device)))
        yield


def without_float16(model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """The model, or where it computes in float16 a clone that computes in ``dtype`` over the same weights.

    Gradients of the loss are around 1e-6 an activation, which float16 rounds away.
    """
    if model.model.get_dtype_inference() != torch.float16:
        return model
    clone = model.clone()
    clone.set_model_compute_dtype(dtype)
    return clone


@contextmanager
def _in_training() -> Iterator[None]:
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def raise_if_interrupted() -> None:
    """ComfyUI's interrupt, for code that runs none of ComfyUI's layers for a while."""
    comfy.model_management.throw_exception_if_processing_interrupted()
