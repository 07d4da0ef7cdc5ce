"""Negative prompts in PixArt, whose layers are told nothing of a call: object patches that ask what call it is."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ....training.attention_guidance import AttentionGuidance, Tokens
from .attend import Attentions, answer, taken
from .conds import Negatives
from .gate import MARK, Call, Gate, Inputs, check_single
from .reach import LayerForward
from .separate import Layout, lengthened

Told = tuple[Call, Mapping[str, Any]]  # of a call: itself, and its transformer options
LAYOUT = Layout(r"blocks\.\d+\.cross_attn")


def attach(
    model: comfy.model_patcher.ModelPatcher, negatives: Negatives, guidance: AttentionGuidance, gate: Gate
) -> None:
    network = model.model.diffusion_model
    current: ContextVar[Told | None] = ContextVar(gate.key, default=None)
    layers = LAYOUT.layers(network)
    for number, name in enumerate(layers):
        path = f"diffusion_model.{name}.forward"
        before = model.get_model_object(path)
        ours = isinstance(before, LayerForward)  # another negative prompt's, at other noise levels
        if not ours and getattr(before, "__self__", None) is not network.get_submodule(name):
            raise ValueError(
                f"another node has replaced {name} of this model, and PixArt's attention can be reached in one way "
                "only: put the negative prompt on the model before that node, or remove one of the two"
            )
        model.add_object_patch(path, _Forward(current, number, network.get_submodule(name), before))

    def run(go: Callable[[Inputs], Tensor], inputs: Inputs, call: Call) -> Tensor:
        check_single(inputs.options)
        longer = lengthened(inputs.with_options(**{MARK: True}), call, range(len(layers)))
        told = current.set((call, longer.options))
        try:
            return go(longer)
        finally:
            current.reset(told)

    gate.open(model, run, LAYOUT.reached(layers))


@dataclass(frozen=True, eq=False)
class _Forward(LayerForward):
    """In the place of a layer's ``forward``: outside of a call of ours that, and inside of one its own parts."""

    current: ContextVar[Told | None]
    number: int
    layer: Any  # comfy.ldm.pixart.blocks.MultiHeadCrossAttention
    before: Callable[..., Tensor]

    def __call__(self, x: Tensor, cond: Tensor, mask: Any = None) -> Tensor:
        told = self.current.get()
        if told is None:
            return self.before(x, cond, mask)
        call, options = told
        rows, channels = x.shape[0], x.shape[-1]
        # ComfyUI has the prompts of all rows behind each other, as one of 1 * (b * n) tokens.
        context = cond.reshape(rows, -1, channels)
        if not call.acts_in(self.number):
            call.answered[self.number] = True
            added = options.get(f"{call.key}/added", 0)
            return self.before(x, context[:, : context.shape[1] - added].reshape(1, -1, channels), mask)
        layer = self.layer
        heads = layer.num_heads

        def attend(query: Tensor, tokens: Tokens, unused: Mapping[str, Any]) -> Tensor:
            return optimized_attention(query, tokens.k, tokens.v, heads, mask=None)

        k, v = layer.kv_linear(context).chunk(2, -1)
        positive, negatives = taken(call, self.number, k, v)
        found = answer(call, Attentions(attend, attend), layer.q_linear(x), positive, negatives, options)
        return layer.proj_drop(layer.proj(found))
