"""Negative prompts where image and text share one attention: texts of their own, carried beside the positive one.

Their tokens are put behind the positive ones, so that all that a model does token by token is done to them, too, by the
model's own layers; an ``optimized_attention_override`` takes each joint attention apart. The image has one stream,
which is what NAG's authors have, too: a call costs the negative tokens and the image's second attention, and not the
image's tokens twice, as CFG does. Pooled vectors, guidance and sizes stay the positive prompt's.

A negative prompt keeps the places that it would have as the only text: a model that counts its text's tokens has the
negative ones moved by a rotation of their queries and keys.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ....training.attention_guidance import AttentionGuidance
from .conds import Negatives
from .gate import MARK, Call, Gate, Inputs, check_single
from .reach import Layer, blocks, replaced
from .split import IMAGE, OVERRIDE, POSITIVE, Layout, SplitAttention

DOUBLE_AND_SINGLE = ("double_blocks", "single_blocks")


@dataclass(frozen=True)
class Prepared:
    """A call's inputs with the negative prompts in them, and where these will be."""

    inputs: Inputs
    layout: Layout
    turns: Sequence[Tensor] = ()


Prepare = Callable[[Any, Inputs, Call], Prepared]  # the first is a BaseModel


def by(
    prepare: Prepare,
    names: Sequence[str],
    current: ContextVar[Call | None] | None = None,
    before: Sequence[Layer] = (),
) -> Callable[..., None]:
    """``attach`` for a family whose calls ``prepare`` makes ready.

    names: lists of the network's blocks, each with one joint attention. current: holds the call, for layers that are
    told nothing else. before: what sees the negative prompts before the blocks, and marks that it did.
    """

    def attach(
        model: comfy.model_patcher.ModelPatcher, negatives: Negatives, guidance: AttentionGuidance, gate: Gate
    ) -> None:
        base, layers = model.model, blocks(model.model.diffusion_model, names)

        def run(go: Callable[[Inputs], Tensor], inputs: Inputs, call: Call) -> Tensor:
            check_single(inputs.options)
            ready, network = prepare(base, inputs, call), base.diffusion_model
            doubtful = replaced(layers, network, base.current_patcher, inputs.options)
            attention = SplitAttention(
                call,
                ready.layout,
                tuple(call.guided(inputs.options)),
                inputs.options.get(OVERRIDE),
                ready.turns,
                len(getattr(network, "double_blocks", ())),
                counts=bool(doubtful),
            )
            with told(current, call):
                answer = go(ready.inputs.with_options(**{OVERRIDE: attention, MARK: True}))
            if attention.used:
                missing = doubtful if doubtful and attention.count < len(layers) else []
                call.answered.update(dict.fromkeys((each.key for each in layers if each not in missing), True))
            return answer

        gate.open(model, run, layers, before)

    return attach


@contextmanager
def told(current: ContextVar[Call | None] | None, call: Call) -> Iterator[None]:
    """Inside, ``current`` holds the call."""
    if current is None:
        yield
        return
    before = current.set(call)
    try:
        yield
    finally:
        current.reset(before)


def with_texts(inputs: Inputs, call: Call, masked: bool = False) -> Inputs:
    """The negative tokens behind the positive ones; with ``masked`` the masks of text tokens, too."""
    assert inputs.text is not None
    rows = [each.rows(inputs.text.shape[0]) for each in call.negatives]
    text = torch.cat([inputs.text, *(each["c_crossattn"].to(inputs.text) for each in rows)], 1)
    own = [each.conds["attention_mask"].cond if "attention_mask" in each.conds else None for each in call.negatives]
    masks = [inputs.rest.get("attention_mask"), *own]
    if not masked or all(mask is None for mask in masks):
        return replace(inputs, text=text)
    mask = side_by_side(masks, [inputs.text.shape[1], *sizes_of(call)], text.shape[0])
    return replace(inputs, text=text, rest={**inputs.rest, "attention_mask": mask})


def side_by_side(masks: Sequence[Tensor | None], sizes: Sequence[int], rows: int) -> Tensor:
    """Masks (b, n) of texts as one: what has none is seen. Floats are added to scores.

    One row stays one: HunyuanVideo takes no more.
    """
    known = next(mask for mask in masks if mask is not None)
    seen = 0 if known.is_floating_point() else 1
    if all(mask is None or mask.shape[0] == 1 for mask in masks):
        rows = 1
    parts = [
        known.new_full((rows, size), seen) if mask is None else comfy.utils.repeat_to_batch_size(mask.to(known), rows)
        for mask, size in zip(masks, sizes, strict=True)
    ]
    return torch.cat(parts, 1)


def sizes_of(call: Call) -> tuple[int, ...]:
    """Tokens of each negative prompt."""
    return tuple(each.text.shape[1] for each in call.negatives)


def tokens_of(latents: Sequence[Tensor], *patch: int) -> int:
    """Of latents (b, c, …) cut into patches, which ComfyUI fills up."""
    total = 0
    for each in latents:
        count = 1
        for side, size in zip(each.shape[-len(patch) :], patch, strict=True):
            count *= ceil(side / size)
        total += count
    return total


def turns_by(embedder: Any, moves: Sequence[Sequence[float]], like: Tensor) -> list[Tensor]:
    """Rotations by so many places along each axis of a model's positions."""
    return [embedder(torch.tensor([[move]], dtype=torch.float32, device=like.device)) for move in moves]


def back_to_start(text: int, sizes: Sequence[int]) -> list[int]:
    """From the place of each negative text behind the others to that of the only text."""
    return [-(text + sum(sizes[:number])) for number in range(len(sizes))]


def flux(model: Any, inputs: Inputs, call: Call) -> Prepared:
    """FLUX.1 and Chroma, whose text has no places; FLUX.2, Radiance and LongCat, whose text is counted."""
    net, sizes = model.diffusion_model, sizes_of(call)
    assert inputs.text is not None
    text = inputs.text.shape[1]
    latents = [inputs.x, *(inputs.rest.get("ref_latents") or [])]
    layout = Layout.of(text, sizes, tokens_of(latents, net.patch_size, net.patch_size))
    ready, starts = with_texts(inputs, call), back_to_start(text, sizes)
    counted = list(net.params.txt_ids_dims) or [0] * getattr(net.params, "use_sequential_txt_ids", False)
    if not counted:
        return Prepared(ready, layout)
    if type(model).__name__ == "LongCatImage":  # places its picture behind the text, which it measures
        rope = {"shift_y": float(text), "shift_x": float(text), **inputs.options.get("rope_options", {})}
        ready = ready.with_options(rope_options=rope)
        starts = [start + text - size for start, size in zip(starts, sizes, strict=True)]
    moves = [[start if axis in counted else 0 for axis in range(len(net.params.axes_dim))] for start in starts]
    return Prepared(ready, layout, turns_by(net.pe_embedder, moves, inputs.x))


def sd3(model: Any, inputs: Inputs, call: Call) -> Prepared:
    net = model.diffusion_model
    assert inputs.text is not None
    if net.context_processor is not None:
        raise ValueError("this SD3 mixes its text's tokens before its blocks, where no hook of ComfyUI reaches them")
    text, patch = inputs.text.shape[1] + net.register_length, net.patch_size
    return Prepared(with_texts(inputs, call), Layout.of(text, sizes_of(call), tokens_of([inputs.x], patch, patch)))


def qwen(model: Any, inputs: Inputs, call: Call) -> Prepared:
    """Qwen-Image, which counts its text along all three axes."""
    net, sizes = model.diffusion_model, sizes_of(call)
    assert inputs.text is not None
    text, patch = inputs.text.shape[1], net.patch_size
    latents = [inputs.x, *(inputs.rest.get("ref_latents") or [])]
    frames = sum(each.shape[2] * tokens_of([each], patch, patch) for each in latents)
    moves = [[start] * 3 for start in back_to_start(text, sizes)]
    ready = with_texts(inputs, call, masked=True)
    return Prepared(ready, Layout.of(text, sizes, frames), turns_by(net.pe_embedder, moves, inputs.x))


def hidream(model: Any, inputs: Inputs, call: Call) -> Prepared:
    """HiDream: an image, and behind it the prompt by T5, by one layer of Llama, and by another in every block."""
    net, name = model.diffusion_model, "encoder_hidden_states_llama3"  # (b, layers, tokens, width)
    assert inputs.text is not None
    own, rows = inputs.rest[name], [each.rows(inputs.text.shape[0]) for each in call.negatives]
    if not all(name in each for each in rows):
        raise ValueError("the negative prompt has no encoding by Llama: encode it with HiDream's own text encoders")
    llama = torch.cat([own, *(each[name].to(own) for each in rows)], 2)
    ready = with_texts(inputs, call)
    edited = inputs.rest.get("image_cond")
    image = tokens_of([inputs.x] if edited is None else [inputs.x, edited], net.patch_size, net.patch_size)
    of_t5 = ((POSITIVE, inputs.text.shape[1]), *enumerate(sizes_of(call)))
    of_llama = ((POSITIVE, own.shape[2]), *enumerate(each[name].shape[2] for each in rows))
    layout = Layout(((IMAGE, image), *of_t5, *of_llama, *of_llama))
    return Prepared(replace(ready, rest={**ready.rest, name: llama}), layout)


# Class of a diffusion model -> attach(model, negatives, guidance, gate). A class counts for what derives from it.
JOINT: dict[str, Any] = {
    "Flux": by(flux, DOUBLE_AND_SINGLE),
    "Chroma": by(flux, DOUBLE_AND_SINGLE),
    "OpenAISignatureMMDITWrapper": by(sd3, ("joint_blocks",)),
    "QwenImageTransformer2DModel": by(qwen, ("transformer_blocks",)),
    "HiDreamImageTransformer2DModel": by(hidream, ("double_stream_blocks", "single_stream_blocks")),
}
