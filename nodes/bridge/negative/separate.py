"""Negative prompts in transformers that attend to their text separately: Wan, Cosmos and LTX Video.

The negative tokens are put behind the positive ones before the model embeds them, token by token as it does. Object
patches on the layers tell their attention, by an ``optimized_attention_override`` for that layer alone, to take the
tokens apart again. So the layer's own ``forward`` runs, with whatever other nodes have put around it, and its own
projections and norms make the negative keys and values.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ....training.attention_guidance import AttentionGuidance, Tokens
from .attend import Attentions, answer, append, taken
from .conds import Encoded, Negatives
from .gate import Call, Gate, Inputs
from .reach import Layer, LayerForward

OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True)
class Layout:
    """Where a family attends to its text."""

    path: str  # of the layers, a regular expression; their ``forward`` takes x and then the text
    tokens_first: bool = False  # the text that a layer is given is (tokens, b, c)
    masked: bool = False  # padding is masked: that of a negative prompt is cut off

    def layers(self, network: torch.nn.Module) -> list[str]:
        return [name for name, _ in network.named_modules() if re.fullmatch(self.path, name)]

    @staticmethod
    def reached(layers: Sequence[str]) -> list[Layer]:
        """Block by block, as these families have them."""
        return [Layer(number, path, ("double_block", number)) for number, path in enumerate(layers)]


WAN = Layout(r"(.*\.)?(vace_)?blocks\.\d+\.cross_attn")
COSMOS = Layout(r"blocks\.\w+\.blocks\.\d+\.block\.attn", tokens_first=True)
COSMOS_PREDICT2 = Layout(r"blocks\.\d+\.cross_attn")
LTX = Layout(r"transformer_blocks\.\d+\.attn2", masked=True)


def attach_to(layout: Layout) -> Callable[..., None]:
    """``attach`` of the models with this layout."""

    def attach(
        model: comfy.model_patcher.ModelPatcher, negatives: Negatives, guidance: AttentionGuidance, gate: Gate
    ) -> None:
        network = model.model.diffusion_model
        layers = [name for name in layout.layers(network) if not vars(network.get_submodule(name)).get("is_selfattn")]
        for number, name in enumerate(layers):
            path = f"diffusion_model.{name}.forward"
            images = "k_img" in network.get_submodule(name)._modules
            forward = Forward(gate.key, number, model.get_model_object(path), layout.tokens_first, images)
            model.add_object_patch(path, forward)

        def run(go: Callable[[Inputs], Tensor], inputs: Inputs, call: Call) -> Tensor:
            call = replace(call, negatives=tuple(map(without_padding, call.negatives))) if layout.masked else call
            longer = lengthened(inputs, call, range(len(layers)))
            return go(longer.with_options(**{gate.key: call}))

        gate.open(model, run, layout.reached(layers))

    return attach


def without_padding(encoded: Encoded) -> Encoded:
    """Only the tokens that the text encoder does not call padding, where all rows have the same."""
    mask = encoded.conds.get("attention_mask")
    if mask is None or mask.cond.shape[0] != 1:
        return encoded
    text = encoded.conds["c_crossattn"]
    return replace(encoded, conds={**encoded.conds, "c_crossattn": text._copy_with(text.cond[:, mask.cond[0] != 0])})


def lengthened(inputs: Inputs, call: Call, layers: range) -> Inputs:
    """With the negative tokens behind the text, unless their keys and values are kept by all layers that act."""
    assert inputs.text is not None, "these models take text"
    if call.kept is not None and all(layer in call.kept for layer in layers if call.acts_in(layer)):
        return inputs
    text = append(call, None, inputs.text)
    added, rest = text.shape[1] - inputs.text.shape[1], dict(inputs.rest)
    mask = rest.get("attention_mask")
    if mask is not None and mask.shape[-1] == inputs.text.shape[1]:
        rest["attention_mask"] = torch.cat([mask, mask.new_ones(*mask.shape[:-1], added)], -1)
    return replace(inputs, text=text, rest=rest).with_options(**{_added(call): added})


def _added(call: Call) -> str:
    return f"{call.key}/added"


@dataclass(frozen=True, eq=False)
class Forward(LayerForward):
    """In the place of a layer's ``forward``, which it calls."""

    key: str
    number: int
    before: Callable[..., Tensor]
    tokens_first: bool
    images: bool  # it attends to an image's tokens, too, which stand before the text's

    def __call__(self, x: Tensor, context: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        options = kwargs.get("transformer_options") or {}
        call = options.get(self.key)
        if call is None or context is None:
            return self.before(x, context, *args, **kwargs)
        call.answered[self.number] = not call.acts_in(self.number)
        if call.acts_in(self.number):
            images = kwargs.get("context_img_len", 0) if self.images else 0
            split = _below(options.get(OVERRIDE), _Split(call, self.number, images, None))
            kwargs["transformer_options"] = {**options, OVERRIDE: split}
        elif added := options.get(_added(call), 0):
            context = context[:-added] if self.tokens_first else context[:, :-added]
            if kwargs.get("mask") is not None:
                kwargs["mask"] = kwargs["mask"][..., :-added]
        return self.before(x, context, *args, **kwargs)


def _below(other: Callable | None, split: "_Split") -> "_Split":
    """Another negative prompt, whose node came later, has its tokens behind ours, and takes them off first."""
    if isinstance(other, _Split):
        return replace(other, before=_below(other.before, split))
    return replace(split, before=other)


@dataclass(frozen=True, eq=False)
class _Split:
    """An attention to both texts, one behind the other."""

    call: Call
    layer: int
    images: int  # tokens of an image that the layer attends to on their own
    before: Callable[..., Tensor] | None  # another pack's override

    def __call__(self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any):
        def plain(query: Tensor, tokens: Tokens, options: Mapping[str, Any]) -> Tensor:
            return attention(query, tokens.k, tokens.v, heads, **asked, mask=tokens.mask, transformer_options=options)

        def usual(query: Tensor, tokens: Tokens, options: Mapping[str, Any]) -> Tensor:
            if self.before is None:
                return plain(query, tokens, options)
            told = {**asked, "mask": tokens.mask, "transformer_options": options}
            return self.before(attention, query, tokens.k, tokens.v, heads, **told)

        options = kwargs.get("transformer_options") or {}
        if self.images and k.shape[-2] == self.images:
            if self.before is None:
                return attention(q, k, v, heads, *args, **kwargs)
            return self.before(attention, q, k, v, heads, *args, **kwargs)
        mask = args[0] if args else kwargs.get("mask")
        left_out = ("mask", "transformer_options", "skip_output_reshape")
        asked = {name: value for name, value in kwargs.items() if name not in left_out}
        positive, negatives = taken(self.call, self.layer, k, v, mask)
        found = answer(self.call, Attentions(usual, plain), q, positive, negatives, options)
        if kwargs.get("skip_output_reshape"):
            return found.unflatten(-1, (heads, -1)).transpose(1, 2)
        return found
