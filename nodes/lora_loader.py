"""A style adapter on a model, complete or with a message."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..training.data.captions import listed
from .lora_file_input import NO_FILE, file_fingerprint, file_input, stated
from .lora_loader_inputs import GROUPS, strength_widgets
from .sockets import LORA
from .window_inputs import ALL_LEVELS, window_of

if TYPE_CHECKING:
    from .bridge.adapters import Applied

logger = logging.getLogger(__name__)


class StyleLoRALoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleLoRALoader",
            display_name="Load Style LoRA",
            category="stylewright/model",
            description=(
                "Puts an adapter on a model, from a file of any common tool or straight from a trainer, says what it "
                "is and gives its style phrase. With strengths by part of the model and by noise level. Refuses an "
                "adapter of another model family, and says which tensors found no place."
            ),
            search_aliases=["load lora", "style lora", "apply lora", "adapter", "dora", "lokr", "loha"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the adapter was trained on, or one of its family."),
                file_input(),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the adapter is added to the model. 1 is as trained, 0 nothing.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="The same for the text encoder, of an adapter that was trained with one.",
                ),
                LORA.Input("lora", optional=True, tooltip="An adapter from a trainer in this graph."),
                io.Clip.Input("clip", optional=True, tooltip="Only for adapters that change the text encoder, too."),
                *strength_widgets(),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the adapter on it."),
                io.Clip.Output("clip", tooltip="The text encoder, where one is linked."),
                io.String.Output(
                    "style_phrase",
                    tooltip="What the style is called in prompts, '(content) in (style phrase) style'. "
                    "Empty for files of other tools.",
                ),
                io.String.Output("info", tooltip="What the adapter is and how it was made, and how it acts here."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = NO_FILE, **unused: object) -> object:
        return file_fingerprint(lora_name)

    @classmethod
    def execute(
        cls,
        model: object,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        lora: dict | None = None,
        clip: object = None,
        early: float = 1.0,
        middle: float = 1.0,
        late: float = 1.0,
        attention: float = 1.0,
        mlp: float = 1.0,
        group_strengths: str = "",
        window: str = ALL_LEVELS,
        window_low: float = -20.0,
        window_high: float = -6.5,
        window_edge: float = 0.0,
        outside: float = 0.0,
    ) -> io.NodeOutput:
        from ..training.adapters.groups import read_strengths
        from ..training.formats.description import describe
        from .bridge.adapters import Strengths, apply_adapter, chosen  # not at start-up
        from .bridge.previews import show_text
        from .bridge.windowed import sentence

        adapter = chosen(stated(lora_name), lora)
        sliders = dict(zip(GROUPS, (early, middle, late, attention, mlp), strict=True))
        groups = {group: strength for group, strength in sliders.items() if strength != 1} | read_strengths(
            group_strengths
        )
        levels = window_of(window, model, window_low, window_high, window_edge, outside)
        strengths = Strengths(strength_model, strength_clip, groups, levels)
        warn = _warner(adapter.name, cls.hidden.unique_id)
        applied = apply_adapter(model, clip, adapter, strengths, warn=warn)
        message = report(adapter.name, applied)
        (logger.warning if applied.homeless or applied.missized or applied.left_out else logger.info)(message)
        strength = strength_text(strength_model, None if clip is None else strength_clip, groups)
        acting = "\n".join([message, strength, *([] if levels is None else [sentence(model, levels)])])
        info = f"{acting}\n{describe(adapter.file)}"
        # What a file is stands on the node since it was picked (web/adapters.js).
        show_text(cls.hidden.unique_id, acting if stated(lora_name) else info)
        return io.NodeOutput(applied.model, applied.clip, adapter.style_phrase, info)


def _warner(name: str, node_id: str | None) -> Callable[[str], None]:
    """Says in the log and on the node what turns out while sampling."""

    def warn(text: str) -> None:
        from .bridge.previews import show_text

        logger.warning("%s: %s", name, text)
        show_text(node_id, f"{name}: {text}")

    return warn


def strength_text(model: float, clip: float | None, groups: Mapping[str, float]) -> str:
    """How much of the adapter is added, in words; ``clip`` None = there is no text encoder."""
    text = f"with strength {model:g}" + ("" if clip is None else f", {clip:g} in the text encoder")
    if groups:
        text += "; times " + ", ".join(f"{factor:g} in {group}" for group, factor in groups.items())
    return text if model or clip else f"{text}, which is nothing at all"


def report(name: str, applied: "Applied") -> str:
    """What was applied, and what was not."""
    text = f"{name}: {applied.layers} layers"
    if applied.missized:
        text += f". {len(applied.missized)} layers have another size in this model: {listed(applied.missized)}"
    if applied.left_out:
        text += f". {applied.left_out} layers are for the text encoder: link the clip input to have them"
    if applied.homeless:
        text += f". {len(applied.homeless)} tensors found no place: {listed(applied.homeless)}"
    if applied.idle:
        text += f". It has no layers in {listed(applied.idle)}, whose strength changes nothing"
    return text
