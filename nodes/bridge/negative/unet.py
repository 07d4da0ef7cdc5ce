"""Negative prompts in UNets (SD1.5, SD2.1, SDXL and their kin): ComfyUI's attn2 patches, brought in for a call.

They are put into the options of one call, behind all that other nodes have put there, whatever the order of the nodes:
another pack's replacement of a layer's attention answers for the positive prompt, and ours is around it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ....training.attention_guidance import AttentionGuidance, Tokens
from .attend import Attentions, answer, append, taken
from .conds import Negatives
from .gate import Call, Gate, Inputs
from .reach import Layer

Place = tuple[str, int, int]  # "input", "middle" or "output", its number there, and the block's in the transformer


def attach(
    model: comfy.model_patcher.ModelPatcher, negatives: Negatives, guidance: AttentionGuidance, gate: Gate
) -> None:
    found = cross_attentions(model.model.diffusion_model)
    layers = {layer.key: number for number, layer in enumerate(found)}
    text, replacement = _Text(gate.key, layers), _Replacement(gate.key, layers)

    def run(go: Any, inputs: Inputs, call: Call) -> Tensor:
        patches = inputs.options.get("patches", {})
        replaced = inputs.options.get("patches_replace", {})
        before = replaced.get("attn2", {})
        acting = [place for place, number in layers.items() if call.acts_in(number)]
        call.answered.update({place: True for place in layers if place not in acting})
        options = {
            "patches": {**patches, "attn2_patch": [*patches.get("attn2_patch", []), text]},
            "patches_replace": {**replaced, "attn2": {**before, **dict.fromkeys(acting, replacement)}},
            f"{gate.key}/before": before,
        }
        return go(inputs.with_options(**options))

    gate.open(model, run, found)


def cross_attentions(unet: nn.Module) -> list[Layer]:
    """Those of a UNet, from its input to its output."""
    found = []
    counts = [len(unet.get_submodule(f"{name}_blocks")._modules) for name in ("input", "output")]
    blocks: list[tuple[str, int, str]] = [
        *(("input", number, f"input_blocks.{number}") for number in range(counts[0])),
        ("middle", 0, "middle_block"),
        *(("output", number, f"output_blocks.{number}") for number in range(counts[1])),
    ]
    for name, number, path in blocks:
        names = [each for each, _ in unet.get_submodule(path).named_modules() if each.endswith(".attn2")]
        for parent, index, layer in (each.rsplit(".", 2) for each in names):
            if parent.endswith("transformer_blocks"):
                found.append(Layer((name, number, int(index)), f"{path}.{parent}.{index}.{layer}"))
    return found


def _place(options: Mapping[str, Any]) -> Place | None:
    block = options.get("block")
    return None if block is None else (block[0], block[1], options.get("block_index", 0))


@dataclass(frozen=True)
class _Text:
    """attn2_patch: the negative tokens behind the text, so that the layer's own projections see them."""

    key: str
    layers: Mapping[Place, int]

    def __call__(self, n: Tensor, context: Tensor, value: Tensor | None, options: Mapping) -> tuple:
        call, place = options[self.key], _place(options)
        if place is None or place not in self.layers or not call.acts_in(self.layers[place]):
            return n, context, value
        call.answered.setdefault(place, False)
        longer = append(call, place, context)
        return n, longer, longer if value is None or value is context else append(call, place, value)


@dataclass(frozen=True)
class _Replacement:
    """attn2_replace: of the projected q, k, v."""

    key: str
    layers: Mapping[Place, int]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping) -> Tensor:
        call, place = options[self.key], _place(options)
        before = options[f"{self.key}/before"]
        other = before.get(place) or before.get(options.get("block"))

        def usual(query: Tensor, tokens: Tokens, some: Mapping[str, Any]) -> Tensor:
            return _plain(query, tokens, some) if other is None else other(query, tokens.k, tokens.v, some)

        positive, negatives = taken(call, place, k, v)
        return answer(call, Attentions(usual, _plain), q, positive, negatives, options)


def _plain(q: Tensor, tokens: Tokens, options: Mapping[str, Any]) -> Tensor:
    return optimized_attention(
        q, tokens.k, tokens.v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
    )
