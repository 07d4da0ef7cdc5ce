"""A style adapter on a model, complete or with a message."""

import logging
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..training.data.captions import listed
from .bridge.files import adapter_names, adapter_path
from .sockets import LORA

if TYPE_CHECKING:
    from .bridge.adapters import Applied

logger = logging.getLogger(__name__)

NO_FILE = "[from the lora input]"


class StyleLoRALoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleLoRALoader",
            display_name="Load Style LoRA",
            category="stylewright/model",
            description=(
                "Puts an adapter on a model, from a file of any common tool or straight from a trainer, and gives its "
                "style phrase. Refuses an adapter of another model family, and says which tensors found no place."
            ),
            search_aliases=["load lora", "style lora", "apply lora", "adapter", "dora", "lokr", "loha"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the adapter was trained on, or one of its family."),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_FILE, *adapter_names()],
                    default=NO_FILE,
                    tooltip="A file in models/loras. Leave it at the first entry to use the lora input.",
                ),
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
                    tooltip="The same for the text encoder. Adapters of ours have nothing for it.",
                ),
                LORA.Input("lora", optional=True, tooltip="An adapter from a trainer in this graph."),
                io.Clip.Input("clip", optional=True, tooltip="Only for adapters that change the text encoder, too."),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the adapter on it."),
                io.Clip.Output("clip", tooltip="The text encoder, where one is linked."),
                io.String.Output(
                    "style_phrase",
                    tooltip="What the style is called in prompts, '{content} in {style phrase} style'. "
                    "Empty for files of other tools.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = NO_FILE, **unused: object) -> object:
        """A file is read again when it changes."""
        if lora_name == NO_FILE:
            return None
        status = adapter_path(lora_name).stat()
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(
        cls,
        model: object,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        lora: dict | None = None,
        clip: object = None,
    ) -> io.NodeOutput:
        from .bridge.adapters import apply_adapter, read_tensors, with_origin  # the file formats: not at start-up
        from .bridge.previews import show_text

        if (lora is None) == (lora_name == NO_FILE):
            raise ValueError(
                f"an adapter comes either from a file or from the lora input: got lora_name={lora_name!r} and "
                f"{'no' if lora is None else 'a'} linked one"
            )
        adapter = read_tensors(adapter_path(lora_name)) if lora is None else with_origin(lora)
        applied = apply_adapter(model, clip, adapter, strength_model=strength_model, strength_clip=strength_clip)
        message = report(adapter.name, applied)
        (logger.warning if applied.homeless or applied.missized else logger.info)(message)
        show_text(cls.hidden.unique_id, message)
        return io.NodeOutput(applied.model, applied.clip, adapter.style_phrase)


def report(name: str, applied: "Applied") -> str:
    """What was applied, and what was not."""
    text = f"{name}: {applied.layers} layers"
    if applied.missized:
        text += f". {len(applied.missized)} layers have another size in this model: {listed(applied.missized)}"
    if applied.homeless:
        text += f". {len(applied.homeless)} tensors found no place: {listed(applied.homeless)}"
    return text
