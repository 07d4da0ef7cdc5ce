"""Gradients through a frozen network that are right, and small where memory is short.

ComfyUI's FLUX and its kin add to the residual stream in place (``img += …``). That destroys what autograd kept for
the normalisation before the addition, which torch notices, and under checkpointing the block's own input, which
nobody notices: the recomputed block starts from the wrong tensor and the gradients are off by a third.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_later


@contextmanager
def differentiable(module: nn.Module, *, checkpoint: bool = False) -> Iterator[None]:
    """Inside, gradients through ``module`` are those of the same network written without in-place additions.

    With ``checkpoint`` the activations inside each repeated block are dropped and computed again in the backward
    pass: about a third more arithmetic for a fraction of the memory. The outputs are the same bit for bit. The
    backward pass belongs inside, too.
    """
    blocks = repeated_blocks(module)
    if checkpoint and not blocks:
        raise ValueError(
            f"{type(module).__name__} has no repeated blocks to checkpoint: switch gradient checkpointing off"
        )
    streams = _Streams()
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(streams.forget).remove)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(streams.enter, with_kwargs=True).remove)
            if checkpoint:
                stack.enter_context(_checkpointed(block, streams))
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


@contextmanager
def _checkpointed(block: nn.Module, streams: _Streams) -> Iterator[None]:
    before = vars(block).get("forward")
    block.forward = _recomputing(block, block.forward, streams)
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def _recomputing(block: nn.Module, forward: Callable, streams: _Streams) -> Callable:
    """``forward`` that keeps only its inputs, and gives each of its runs copies to write into."""

    def on_copies(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_copied, args))
        kwargs = {name: _copied(value) for name, value in kwargs.items()}
        streams.enter(block, args, kwargs)
        return forward(*args, **kwargs)

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return recompute_later(on_copies, *args, use_reentrant=False, **kwargs)

    return recomputing


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
