"""An adapter that acts by its input, as a LoRA that loads everywhere."""

import logging

from comfy_api.latest import io

from .bridge.sampling import SAMPLERS, SCHEDULERS, Brush
from .lora_file_input import NO_FILE, file_fingerprint, file_input, stated
from .sockets import LORA

logger = logging.getLogger(__name__)


class StyleInjectToLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleInjectToLoRA",
            display_name="StyleInject to LoRA",
            category="stylewright/model",
            description=(
                "Makes a LoRA that comes nearest to a StyleInject adapter, which no other loader takes: it draws with "
                "the adapter, looks at what it adds to each layer, and fits. What is lost is measured and said."
            ),
            search_aliases=["merge styleinject", "export lora", "convert styleinject", "approximate"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the adapter was trained on, without it."),
                file_input(),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What is drawn to look at the adapter: a prompt such as it is for, with its style phrase.",
                ),
                io.Conditioning.Input("negative", tooltip="As in your KSampler."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the size that you draw at. More pictures in it are more to look at.",
                ),
                io.Int.Input(
                    "rank", default=16, min=1, max=1024, tooltip="Of the LoRA. More loses less, and is a larger file."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the noise that is drawn from.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="Of the sampler, as you draw."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="As you draw."),
                io.Combo.Input("sampler_name", options=SAMPLERS, default="euler", tooltip="As you draw."),
                io.Combo.Input("scheduler", options=SCHEDULERS, default="simple", tooltip="As you draw."),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip="Where the LoRA goes, below models/loras; a number is added. Empty: it is not saved.",
                ),
                LORA.Input("lora", optional=True, tooltip="An adapter from a trainer in this graph."),
            ],
            outputs=[
                LORA.Output("lora", tooltip="The LoRA, for any loader."),
                io.String.Output("info", tooltip="What was lost, and what the LoRA is."),
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
        positive: list,
        negative: list,
        latent_image: dict,
        rank: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        file_name: str,
        lora: dict | None = None,
    ) -> io.NodeOutput:
        from ..training.formats.description import describe
        from ..training.formats.resizing import write_file
        from .bridge.adapters import chosen
        from .bridge.approximating import Scene, approximated
        from .bridge.files import adapter_pattern, free_adapter_path, refresh_adapter_names
        from .bridge.previews import show_text

        adapter = chosen(stated(lora_name), lora)
        words = {"rank": str(rank), "style": adapter.style_phrase}
        if file_name.strip():
            adapter_pattern(file_name, words)  # before any work
        brush = Brush(sampler_name, scheduler, steps, cfg, seed)
        made, summary = approximated(model, adapter, Scene(positive, negative, latent_image), brush, rank)
        lines = [f"{adapter.name}: {summary}", describe(made.file)]
        if file_name.strip():
            path = free_adapter_path(file_name, words)
            write_file(path, made.file)
            refresh_adapter_names()
            lines.insert(1, f"saved as {path.name}")
        info = "\n".join(lines)
        logger.info(lines[0])
        show_text(cls.hidden.unique_id, info)
        return io.NodeOutput(made, info)
