"""Gradients through a frozen network that are right, and small where memory is short.

ComfyUI's FLUX and its kin add to the residual stream in place (``img += …``). That destroys what autograd kept for
the normalisation before the addition, which torch notices, and under checkpointing the block's own input, which
nobody notices: the recomputed block starts from the wrong tensor and the gradients are off by a third.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import Context, ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute_later

from .offload import Garage


@contextmanager
def differentiable(
    module: nn.Module, *, checkpoint: bool | Collection[int] = False, offload: torch.device | None = None
) -> Iterator[None]:
    """Inside, gradients through ``module`` are those of the same network written without in-place additions.

    With ``checkpoint`` the activations inside each repeated block, or inside those of these places among
    :func:`repeated_blocks`, are dropped and computed again in the backward pass: about a third more arithmetic for
    a fraction of the memory. What is kept of such a block, its input, waits in CPU memory where ``offload`` names
    the device that it is computed on. Outputs and gradients are the same bit for bit, whatever is chosen. The
    backward pass belongs inside, too.
    """
    blocks = repeated_blocks(module)
    if checkpoint and not blocks:
        raise ValueError(
            f"{type(module).__name__} has no repeated blocks to checkpoint: switch gradient checkpointing off"
        )
    chosen = range(len(blocks)) if checkpoint is True else checkpoint or ()
    streams, garage = _Streams(), None if offload is None else Garage(offload)
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(streams.forget).remove)
        if garage is not None:
            stack.callback(module.register_forward_pre_hook(partial(_begin, garage)).remove)
        for place, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(streams.enter, with_kwargs=True).remove)
            if place in chosen:
                stack.enter_context(_checkpointed(block, streams, garage))
        for norm in normalisations(module):
            stack.callback(norm.register_forward_pre_hook(streams.protect).remove)
        yield


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The innermost blocks that a network repeats: elements of its lists of like modules, in order.

    An element that is itself a sequence (ComfyUI's UNet calls only the parts of those) stands for its parts. Lists
    of unlike modules (diffusers' feed-forward layers) and single layers are no blocks.
    """
    found: dict[nn.Module, None] = {}
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len({type(element) for element in part}) == 1:
            for element in part:
                parts = element.children() if isinstance(element, nn.Sequential | nn.ModuleList) else [element]
                found.update((child, None) for child in parts if any(child.children()))
    return [block for block in found if not any(inner in found for inner in block.modules() if inner is not block)]


def normalisations(module: nn.Module) -> list[nn.Module]:
    """The layers that keep their input for the backward pass and are named for normalising it."""
    return [part for part in module.modules() if "Norm" in type(part).__name__ and not any(part.children())]


class _Streams:
    """Knows the memory of the tensors that came into blocks: what a block may later overwrite."""

    def __init__(self) -> None:
        self._memory: set[int] = set()

    def forget(self, module: nn.Module, args: tuple) -> None:
        self._memory.clear()

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self._memory.add(_memory(value))

    def protect(self, norm: nn.Module, args: tuple) -> tuple:
        """Has a normalisation keep a copy. Without this the block's next addition overwrites what it kept."""
        if args and isinstance(args[0], Tensor) and args[0].requires_grad and _memory(args[0]) in self._memory:
            return args[0].clone(), *args[1:]
        return args


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _begin(garage: Garage, module: nn.Module, args: tuple) -> None:
    garage.begin()


@contextmanager
def _checkpointed(block: nn.Module, streams: _Streams, garage: Garage | None) -> Iterator[None]:
    before = vars(block).get("forward")
    block.forward = _recomputing(block, block.forward, streams, garage)
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def _recomputing(block: nn.Module, forward: Callable, streams: _Streams, garage: Garage | None) -> Callable:
    """``forward`` that keeps only its inputs, and gives each of its runs copies to write into.

    Each run of a call sees the context variables that the first one saw, which the network may have set anew since.
    """

    def on_copies(context: Context, names: tuple[str, ...], _: Tensor | None, *values: Any) -> Any:
        values = tuple(_copied(garage.take(value) if garage else value) for value in values)
        args, kwargs = values[: len(values) - len(names)], dict(zip(names, values[-len(names) :], strict=False))
        streams.enter(block, args, kwargs)
        return context.copy().run(forward, *args, **kwargs)

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        values = (*args, *kwargs.values())
        device = next((value.new_empty(0) for value in values if isinstance(value, Tensor)), None)
        # ComfyUI writes into one dictionary, which all blocks get, which of them is computed.
        values = tuple(dict(value) if type(value) is dict else value for value in values)
        values = map(garage.park, values) if garage else values
        # torch reads from a tensor among the arguments which device's generator it has to put back.
        again = _again.get()
        return recompute_later(
            *(on_copies, copy_context(), tuple(kwargs), device, *values),
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _all_of(again)),
        )

    return recomputing


@contextmanager
def also_recomputed(mode: TorchFunctionMode) -> Iterator[None]:
    """``with mode``, in which what :func:`differentiable` computes again of the inside is computed, too."""
    with entered_again(lambda: mode), mode:
        yield


@contextmanager
def entered_again(make: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """What :func:`differentiable` computes again of the inside is computed within a context of ``make``, for example
    with the hooks that are on the network for the time of its call alone.
    """
    token = _again.set((*_again.get(), make))
    try:
        yield
    finally:
        _again.reset(token)


_again: ContextVar[tuple[Callable[[], AbstractContextManager], ...]] = ContextVar("again", default=())


@contextmanager
def _all_of(contexts: tuple[Callable[[], AbstractContextManager], ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for make in contexts:
            stack.enter_context(make())
        yield


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
