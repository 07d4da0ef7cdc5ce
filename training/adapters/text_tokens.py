"""Which of a prompt's tokens are its own, for layers that take means over them.

Text encoders begin with a token whose features are far larger than the others', and fill prompts up to a length. A
model is told of the filling by some encoders only, in a mask beside the context; CLIP's first token is known by its
place. A layer learns of both in the call of the network that it is part of.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# Layers that get the tokens of a prompt and nothing else, in diffusers' names and in native ones.
_OF_TEXT = re.compile(
    r"(?:.*\.)?(?:attn2\.to_[kv]|\w*cross_attn\w*\.(?:k|v|kv|to_k|to_v|k_proj|v_proj|kv_linear)"
    r"|txt_\w+(?:\..*)?|context_block\..*|add_[qkv]_proj|to_add_out)"
)
CLIP_FAMILIES = ("sd15", "sd21", "sdxl", "sdxl-refiner")  # whose context is CLIP's, in pieces of so many tokens:
CLIP_LENGTH = 77
CONTEXTS, MASKS = ("context", "encoder_hidden_states"), ("attention_mask", "encoder_attention_mask")

# (b, n), True for a prompt's own tokens, while a network runs that is told. Not an attribute of a module: a block that
# is computed again in the backward pass has to see what it saw, whatever the network was told since.
_own_tokens: ContextVar[Tensor | None] = ContextVar("own_tokens", default=None)


def reads_text(name: str) -> bool:
    """Whether a layer of this name gets a prompt's tokens, and nothing else."""
    return _OF_TEXT.fullmatch(name) is not None


def counted_tokens(x: Tensor, family: str) -> Tensor | None:
    """(b, n, 1), True for the tokens that count, of a text layer's input (b, n, i); None = all, as far as is known."""
    if x.ndim != 3:
        return None
    mask = _own_tokens.get()
    if mask is not None and (mask.shape[1] != x.shape[1] or len(x) % len(mask)):
        mask = None
    if mask is not None:
        mask = mask.repeat_interleave(len(x) // len(mask), 0)
    if family in CLIP_FAMILIES and x.shape[1] % CLIP_LENGTH == 0:
        first = torch.arange(x.shape[1], device=x.device) % CLIP_LENGTH == 0
        mask = ~first.expand(len(x), -1) if mask is None else mask & ~first
    return None if mask is None else mask[..., None]


@contextmanager
def told_of_text(network: nn.Module) -> Iterator[None]:
    """Inside, the layers of ``network`` know what it is told of its prompts."""
    before = network.register_forward_pre_hook(_tell, with_kwargs=True)
    after = network.register_forward_hook(_forget, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _tell(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    context = next((kwargs[name] for name in CONTEXTS if isinstance(kwargs.get(name), Tensor)), None)
    mask = next((kwargs[name] for name in MASKS if isinstance(kwargs.get(name), Tensor)), None)
    fits = context is not None and mask is not None and mask.shape == context.shape[:2]
    _own_tokens.set(mask.to(context.device) > 0 if fits else None)


def _forget(*unused: Any) -> None:
    _own_tokens.set(None)
