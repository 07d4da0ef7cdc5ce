"""A negative prompt for models that run without CFG: distilled ones, of one step or a few."""

import logging

from comfy_api.latest import io

from .negative_inputs import AUTOMATIC, FROM_FAMILY, chosen, negative_widgets, read_layers
from .window_inputs import ALL_LEVELS, WIDEST, window_of

logger = logging.getLogger(__name__)


class NASANegativeAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NASANegativeAttention",
            display_name="NASA Negative Attention",
            category="stylewright/model",
            description=(
                "Lets a negative prompt act inside the model's attention, without CFG and without a second pass: for "
                "models of one step or a few, and for FLUX. NASA, NAG or value sign flip, with scales by family."
            ),
            search_aliases=["negative prompt", "nasa", "nag", "vsf", "attention guidance", "cfg 1", "turbo"],
            inputs=[
                io.Model.Input("model", tooltip="Any model whose attention to text ComfyUI lets nodes reach."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What is not wanted, from this model's text encoder. Of several prompts the effects are "
                    "averaged by their strengths, each in its range of steps. Zeroed out, it changes nothing.",
                ),
                *negative_widgets(),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model, kept away from the negative prompt. Sample it at CFG 1."),
                io.String.Output("info", tooltip="Method, scale, where they come from, and where they act."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        negative: list,
        method: str = AUTOMATIC,
        scale: float = FROM_FAMILY,
        tau: float = FROM_FAMILY,
        blend: float = FROM_FAMILY,
        text_only: bool = True,
        window: str = ALL_LEVELS,
        window_low: float = -WIDEST,
        window_high: float = WIDEST,
        layers: str = "",
    ) -> io.NodeOutput:
        from ..training.attention_presets import preset
        from .bridge.families import family_of  # not at start-up
        from .bridge.negative import apply
        from .bridge.negative.words import sentence
        from .bridge.previews import show_text

        known = preset(family_of(model), None if method == AUTOMATIC else method)
        settings = chosen(known, scale, tau, blend, text_only)
        levels = window_of(window, model, window_low, window_high, edge=0.0, outside=0.0)
        acting = read_layers(layers)
        patched = apply(model, negative, settings.guidance, levels, acting)
        info = sentence(model, negative, settings, levels, acting)
        logger.info(info)
        show_text(cls.hidden.unique_id, info)
        return io.NodeOutput(patched, info)
