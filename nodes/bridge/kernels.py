"""ComfyUI's forward passes as functions that autograd can differentiate, for the time of a ``with`` block.

Some families call fused kernels that have no backward pass whether ComfyUI's ``in_training`` is set or not, and some
overwrite in place what their gradients need. Here the same arithmetic is done by the kernels' own plain form. The
attention that ``--use-sage-attention`` and its like choose has no backward pass either, and says nothing: gradients
just end there.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import comfy_kitchen
import torch
from comfy_kitchen.backends.eager import rope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

# Modules of comfy_kitchen with the plain form of its kernels, under the kernels' names.
PLAIN = (rope, *(module for name, module in sys.modules.items() if name == "comfy_kitchen.backends.eager.adaln"))

# ComfyUI's attentions that have a backward pass, and where modules keep the chosen one.
DIFFERENTIABLE = ("attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch", "attention_xformers")
CHOSEN = ("optimized_attention", "optimized_attention_masked")
OVERRIDE = "optimized_attention_override"  # transformer option of nodes that choose another
PATCHES = "patches"  # transformer option of nodes that change what blocks pass on

# Products keep their factors for the backward pass.
PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "true_divide", "divide")

# Blocks that overwrite, later on, what parts of theirs keep of their input: class -> names of these.
OVERWRITTEN = {
    "comfy.ldm.pixeldit.modules.PiTBlock": ("norm2",),
    "comfy.ldm.lightricks.model.BasicTransformerBlock": ("attn2",),
}
# Blocks of language models, which write a sum into their own input by torch's ``out``.
WRITES_OUT = ("comfy.text_encoders.llama.TransformerBlock", "comfy.text_encoders.llama.TransformerBlockGemma2")
# A network that remembers what its layers made of a prompt, whatever its weights are by the next call.
REMEMBERS = "comfy.ldm.hidream_o1.model.HiDreamO1Transformer"


@contextmanager
def plain_kernels(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` computes by differentiable functions alone, but for in-place additions to its blocks' inputs.

    Those are :func:`~stylewright.training.gradients.differentiable`'s.
    """
    with ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.enter_context(exchanged(owner, name, value))
        for part in module.modules():
            kind = f"{type(part).__module__}.{type(part).__name__}"
            for name in OVERWRITTEN.get(kind, ()):
                stack.callback(part.get_submodule(name).register_forward_pre_hook(_keep_a_copy).remove)
            if kind == REMEMBERS:
                stack.callback(part.register_forward_pre_hook(_forget).remove)
                stack.callback(part.register_forward_hook(_forget).remove)
            if kind in WRITES_OUT:
                stack.enter_context(exchanged(part, "forward", partial(_without_out, part.forward)))
        if any(type(part).__module__ == "comfy.ldm.lightricks.model" for part in module.modules()):
            norm = comfy.ldm.common_dit.rms_norm  # of its blocks' input, which they overwrite too
            stack.enter_context(exchanged(comfy.ldm.common_dit, "rms_norm", partial(_of_a_copy, norm)))
        yield


def _replacements() -> Iterator[tuple[ModuleType, str, Callable]]:
    """Functions of ComfyUI's modules, and what stands in for them."""
    for plain in PLAIN:
        for name in vars(plain).keys() & vars(comfy_kitchen).keys():
            if callable(vars(plain)[name]):
                yield comfy_kitchen, name, vars(plain)[name]
    for owner, chosen, attention in attentions():
        if attention.__name__ not in DIFFERENTIABLE:
            yield owner, chosen, comfy.ldm.modules.attention.attention_pytorch
    for name, owner in list(sys.modules.items()):
        if name.startswith("comfy.ldm.pixeldit.") and "apply_adaln_" in vars(owner):
            yield owner, "apply_adaln_", _modulated


def attentions() -> Iterator[tuple[ModuleType, str, Any]]:
    """Where ComfyUI's models keep the attention that was chosen: modules, names in them, functions."""
    for name, owner in list(sys.modules.items()):
        if name.startswith("comfy.ldm."):
            for chosen in CHOSEN:
                if chosen in vars(owner):
                    yield owner, chosen, vars(owner)[chosen]


@contextmanager
def exchanged(owner: ModuleType | nn.Module, name: str, value: Callable) -> Iterator[None]:
    """Inside, the owner has another function under this name."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class Attention:
    """Another node's choice of attention, for as long as gradients pass through it."""

    def __init__(self, override: Callable) -> None:
        self._override = override
        self._ends_gradients = False

    def __call__(self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._ends_gradients:
            out = self._override(attention, q, k, v, *args, **kwargs)
            wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
            if out.requires_grad or not wanted:
                return out
            logger.warning("a node before chose an attention that has no backward pass: trained with ComfyUI's own")
            self._ends_gradients = True
        return attention(q, k, v, *args, **kwargs)


class Patch:
    """Another node's patch of what a block passes on, which may overwrite what its own products keep (FreeU V2)."""

    def __init__(self, patch: Callable) -> None:
        self._patch = patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._patch(*args, **kwargs)
        with _ProductsOfCopies():
            return self._patch(*args, **kwargs)


class _ProductsOfCopies(TorchFunctionMode):
    """What is multiplied may be overwritten afterwards: the product has kept a copy."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            args = tuple(arg.clone() if isinstance(arg, Tensor) and arg.requires_grad else arg for arg in args)
        return func(*args, **(kwargs or {}))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x, x, scale) + shift


def _forget(network: Any, *unused: Any) -> None:
    network.clear_kv_cache()


def _of_a_copy(norm: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return norm(x.clone(), *args, **kwargs)


def _keep_a_copy(norm: nn.Module, args: tuple) -> tuple:
    return args[0].clone(), *args[1:]


def _without_out(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    with _WithoutOut():
        return forward(*args, **kwargs)


class _WithoutOut(TorchFunctionMode):
    """Sums come in new tensors, where the caller asked for them in one of his own."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.add:
            kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        return func(*args, **kwargs)
