"""Negative prompts in families that work on their text before it meets the image: each text by itself, in their layers.

By object patches, which are in place for as long as the clone is, and which outside of a call of ours do what was
there before.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ....training.attention_guidance import AttentionGuidance
from .conds import Negatives
from .gate import Call, Gate, Inputs
from .joint import DOUBLE_AND_SINGLE, Prepared, by, sizes_of, tokens_of, with_texts
from .reach import NETWORK, Layer, LayerForward
from .split import IMAGE, POSITIVE, Layout, Parts


def hunyuan(model: Any, inputs: Inputs, call: Call) -> Prepared:
    """HunyuanVideo and HunyuanImage, whose texts may have glyphs: tokens of the letters that are to be drawn."""
    net = model.diffusion_model
    assert inputs.text is not None
    ready, reference = with_texts(inputs, call, masked=True), inputs.rest.get("ref_latent")
    latents = [inputs.x] if reference is None else [inputs.x, reference]
    image = (IMAGE, tokens_of(latents, *net.patch_size))
    texts: Parts = [(POSITIVE, inputs.text.shape[1]), *enumerate(sizes_of(call))]
    rows = [each.rows(inputs.text.shape[0]) for each in call.negatives]
    glyphs = [inputs.rest.get("txt_byt5"), *(each.get("txt_byt5") for each in rows)]
    if net.byt5_in is None or all(each is None for each in glyphs):
        return Prepared(ready, Layout((*texts, image)))
    of_glyphs = [(kind, 0 if each is None else each.shape[1]) for (kind, _), each in zip(texts, glyphs, strict=True)]
    joined = torch.cat([each.to(inputs.text) for each in glyphs if each is not None], 1)
    ready = replace(ready, rest={**ready.rest, "txt_byt5": joined})
    # HunyuanVideo 1.5, which marks kinds of tokens, has them before the text, and HunyuanImage behind it.
    first, second = (texts, of_glyphs) if net.cond_type_embedding is None else (of_glyphs, texts)
    return Prepared(ready, Layout((*first, *second, image)))


def lumina(model: Any, inputs: Inputs, call: Call) -> Prepared:
    """Lumina 2 and Z-Image, whose texts are padded each by itself, and end where the image begins."""
    net = model.diffusion_model
    assert inputs.text is not None
    if inputs.rest.get("ref_latents"):
        raise ValueError(
            "negative prompts inside attention do not know Z-Image's reference pictures: remove one of the two"
        )
    sizes = [_padded(net, size) for size in (inputs.text.shape[1], *sizes_of(call))]
    image = _padded(net, tokens_of([inputs.x], net.patch_size, net.patch_size))
    return Prepared(inputs, Layout.of(sizes[0], tuple(sizes[1:]), image))


def aura(model: Any, inputs: Inputs, call: Call) -> Prepared:
    """AuraFlow, whose texts each have the same learned tokens in front of them."""
    net = model.diffusion_model
    assert inputs.text is not None
    text, *sizes = (size + net.register_tokens.shape[1] for size in (inputs.text.shape[1], *sizes_of(call)))
    image = tokens_of([inputs.x], net.patch_size, net.patch_size)
    return Prepared(with_texts(inputs, call), Layout.of(text, sizes, image))


def _padded(net: nn.Module, size: int) -> int:
    multiple = getattr(net, "pad_tokens_multiple", None) or 1
    return ceil(size / multiple) * multiple


@dataclass(frozen=True, eq=False)
class Refiner(LayerForward):
    """In the place of HunyuanVideo's refiner of text tokens, which has a mean of them and attention among them."""

    key: str
    name: str  # of the layer
    before: Callable[..., Tensor]

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        mask: Tensor | None,
        transformer_options: Mapping[str, Any] = {},
        **more: Any,
    ) -> Tensor:
        def refined(x: Tensor, mask: Tensor | None) -> Tensor:
            return self.before(x, timesteps, mask, transformer_options=transformer_options, **more)

        call = transformer_options.get(self.key)
        if call is None:
            return refined(x, mask)
        call.answered[self.name] = True
        sizes = _all_sizes(x.shape[1], sizes_of(call))
        masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
        return torch.cat([refined(*each) for each in zip(x.split(sizes, 1), masks, strict=True)], 1)


@dataclass(frozen=True, eq=False)
class Embedding(LayerForward):
    """In the place of Lumina's ``embed_all``: the negative texts behind the positive one, as near to the image."""

    key: str
    net: Any  # NextDiT
    before: Callable[..., tuple]

    def __call__(
        self,
        x: Tensor,
        cap_feats: Tensor,
        *more: Any,
        transformer_options: Mapping[str, Any] = {},
        offset: int = 0,
        **named: Any,
    ) -> tuple:
        embeds, places, end = self.before(
            x, cap_feats, *more, transformer_options=transformer_options, offset=offset, **named
        )
        call = transformer_options.get(self.key)
        if call is None:
            return embeds, places, end
        texts, their_places = [embeds[0]], [places[0]]
        for each in call.negatives:
            text = each.rows(x.shape[0])["c_crossattn"].to(cap_feats)
            start = offset + embeds[0].shape[1] - _padded(self.net, text.shape[1])
            text, place, _ = self.net.embed_cap(text, offset=start, bsz=1, device=x.device, dtype=x.dtype)
            texts += text
            their_places += place
        return (torch.cat(texts, 1), *embeds[1:]), (torch.cat(their_places, 1), *places[1:]), end


@dataclass(frozen=True, eq=False)
class RefinerLayer(LayerForward):
    """In the place of one of Lumina's layers for text, which has attention among its tokens."""

    key: str
    name: str  # of the layer
    net: nn.Module
    before: Callable[..., Tensor]

    def __call__(self, x: Tensor, mask: Tensor | None, places: Tensor, *more: Any, **named: Any) -> Tensor:
        call = named.get("transformer_options", {}).get(self.key)
        if call is None:
            return self.before(x, mask, places, *more, **named)
        call.answered[self.name] = True
        sizes = _all_sizes(x.shape[1], [_padded(self.net, size) for size in sizes_of(call)])
        parts = zip(x.split(sizes, 1), places.split(sizes, 1), strict=True)
        return torch.cat([self.before(text, mask, place, *more, **named) for text, place in parts], 1)


@dataclass(frozen=True, eq=False)
class Registers(LayerForward):
    """In the place of AuraFlow's first layer for text: learned tokens before each negative text, as the model puts them
    before the positive one.
    """

    current: ContextVar[Call | None]
    name: str  # of the layer
    net: Any  # MMDiT
    before: Callable[[Tensor], Tensor]

    def __call__(self, text: Tensor) -> Tensor:
        embedded, call = self.before(text), self.current.get()
        if call is None:
            return embedded
        call.answered[self.name] = True
        registers = comfy.ops.cast_to_input(self.net.register_tokens, embedded).expand(len(embedded), -1, -1)
        positive, *negatives = embedded.split(_all_sizes(text.shape[1], sizes_of(call)), 1)
        return torch.cat([positive, *(each for negative in negatives for each in (registers, negative))], 1)


def _all_sizes(length: int, negatives: Sequence[int]) -> list[int]:
    return [length - sum(negatives), *negatives]


def hunyuan_attach(
    model: comfy.model_patcher.ModelPatcher, negatives: Negatives, guidance: AttentionGuidance, gate: Gate
) -> None:
    name = "txt_in"
    _put(model, name, partial(Refiner, gate.key, name))
    by(hunyuan, DOUBLE_AND_SINGLE, before=[Layer(name, name)])(model, negatives, guidance, gate)


def lumina_attach(
    model: comfy.model_patcher.ModelPatcher, negatives: Negatives, guidance: AttentionGuidance, gate: Gate
) -> None:
    net, path = model.model.diffusion_model, f"{NETWORK}.embed_all"
    model.add_object_patch(path, Embedding(gate.key, net, model.get_model_object(path)))
    refiners = [f"context_refiner.{number}" for number in range(len(net.get_submodule("context_refiner")))]
    for name in refiners:
        _put(model, name, partial(RefinerLayer, gate.key, name, net))
    by(lumina, ("layers",), before=[Layer(name, name) for name in refiners])(model, negatives, guidance, gate)


def aura_attach(
    model: comfy.model_patcher.ModelPatcher, negatives: Negatives, guidance: AttentionGuidance, gate: Gate
) -> None:
    current: ContextVar[Call | None] = ContextVar(gate.key, default=None)
    name, net = "cond_seq_linear", model.model.diffusion_model
    _put(model, name, partial(Registers, current, name, net))
    attach = by(aura, ("double_layers", "single_layers"), current, [Layer(name, name)])
    attach(model, negatives, guidance, gate)


def _put(model: comfy.model_patcher.ModelPatcher, name: str, make: Callable[[Callable], LayerForward]) -> None:
    """In the place of a layer's ``forward`` what ``make`` makes around it."""
    path = f"{NETWORK}.{name}.forward"
    model.add_object_patch(path, make(model.get_model_object(path)))


REFINED: dict[str, Any] = {"HunyuanVideo": hunyuan_attach, "NextDiT": lumina_attach, "MMDiT": aura_attach}
