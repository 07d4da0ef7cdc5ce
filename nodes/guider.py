"""Guidance of an adapter's style beside the prompt's."""

import logging
from typing import Any

from comfy_api.latest import io

from .guider_inputs import guidance_of, guidance_widgets
from .window_inputs import ALL_LEVELS, WIDEST, window_of

logger = logging.getLogger(__name__)


class StyleGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleGuider",
            display_name="Style Guidance",
            category="stylewright/sampling",
            description=(
                "A guider with one scale for the adapter's style and one for the prompt: FineStyle's guidance, which "
                "shows the style without what else the reference showed, StyleDrop's, DCO's consistency guidance, or "
                "CFG. The adapter comes and goes within a step, with no weight loaded or patched anew."
            ),
            search_aliases=[
                "finestyle", "styledrop", "dco", "consistency guidance", "reward guidance", "cfg guider", "style scale",
                "lora guidance", "dual model",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model with the adapter, from any loader of LoRAs."),
                io.Model.Input(
                    "base",
                    tooltip="The same model without it: what the adapter's loader gets. Only its adapters count; "
                    "everything else is that of model.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt, for both."),
                io.Conditioning.Input("negative", tooltip="The null prompt, mostly an empty text, or a negative one."),
                *guidance_widgets(),
            ],
            outputs=[
                io.Guider.Output("guider", tooltip="For Sampler Custom Advanced."),
                io.String.Output("info", tooltip="The weights of the predictions, how many there are, and where."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: object,
        base: object,
        positive: list,
        negative: list,
        rule: dict[str, Any] | None = None,  # where ComfyUI does not know the one that a saved graph states
        style_window: str = ALL_LEVELS,
        style_window_low: float = -WIDEST,
        style_window_high: float = -6.5,
        text_window: str = ALL_LEVELS,
        text_window_low: float = -WIDEST,
        text_window_high: float = WIDEST,
    ) -> io.NodeOutput:
        from .bridge.guider import Windows, guider_of  # not at start-up
        from .bridge.previews import show_text
        from .bridge.switching import check_conditionings
        from .prompt_switch import warner

        check_conditionings({"positive": positive, "negative": negative})
        stated, guidance = guidance_of(rule)
        windows = Windows(
            window_of(style_window, model, style_window_low, style_window_high, edge=0.0, outside=0.0),
            window_of(text_window, model, text_window_low, text_window_high, edge=0.0, outside=0.0),
        )
        guider = guider_of(model, base, guidance, windows, warner(cls.hidden.unique_id))
        guider.set_conds(positive, negative)
        info = f"{stated}: {guider.sentence()}"
        (logger.warning if guider.notice else logger.info)(info)
        show_text(cls.hidden.unique_id, info)
        return io.NodeOutput(guider, info)
