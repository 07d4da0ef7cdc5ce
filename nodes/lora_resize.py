"""An adapter at a lower rank."""

import logging

from comfy_api.latest import io

from .lora_file_input import NO_FILE, file_fingerprint, file_input, stated
from .sockets import LORA

logger = logging.getLogger(__name__)

RULES = {"rank": "rank", "share of energy": "energy", "ratio of singular values": "ratio"}


class StyleLoRAResize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleLoRAResize",
            display_name="Resize Style LoRA",
            category="stylewright/model",
            description=(
                "Lowers the rank of an adapter: each layer becomes the nearest one of less rank, and what is lost is "
                "said. A smaller file, or a start for further training at another rank."
            ),
            search_aliases=["resize lora", "lora rank", "svd", "shrink lora", "compress"],
            is_output_node=True,
            inputs=[
                file_input(),
                io.Combo.Input(
                    "by",
                    options=list(RULES),
                    default="rank",
                    tooltip="What decides each layer's rank: one rank for all, the share of the squared singular "
                    "values that is kept, or how small a singular value may be beside the largest.",
                ),
                io.Int.Input("rank", default=8, min=1, max=1024, tooltip="The new rank; by other rules the most."),
                io.Float.Input(
                    "energy",
                    default=0.95,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="By share of energy: how much of the squared change of each layer's weights is kept.",
                ),
                io.Float.Input(
                    "ratio",
                    default=20.0,
                    min=1.0,
                    max=100_000.0,
                    step=1.0,
                    tooltip="By ratio: singular values of at least the largest divided by this are kept.",
                ),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip="Where the result goes, below models/loras; a number is added. Empty: it is not saved.",
                ),
                LORA.Input("lora", optional=True, tooltip="An adapter from a trainer or loader in this graph."),
            ],
            outputs=[
                LORA.Output("lora", tooltip="The adapter at its new rank."),
                io.String.Output("info", tooltip="What was lost, and what the adapter is now."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = NO_FILE, **unused: object) -> object:
        return file_fingerprint(lora_name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        by: str,
        rank: int,
        energy: float,
        ratio: float,
        file_name: str,
        lora: dict | None = None,
    ) -> io.NodeOutput:
        from ..training.formats.description import describe
        from ..training.formats.resizing import Cut, resize_file, write_file
        from .bridge.adapters import AdapterTensors, chosen
        from .bridge.files import free_adapter_path, refresh_adapter_names
        from .bridge.previews import show_text

        adapter = chosen(stated(lora_name), lora)
        rule = RULES[by]
        cut = Cut(rule, {"rank": rank, "energy": energy, "ratio": ratio}[rule], most=rank)
        file, resized = resize_file(adapter.file, cut)
        lines = [f"{adapter.name}: {resized.summary()}", describe(file)]
        if file_name.strip():
            path = free_adapter_path(file_name, {"rank": str(rank), "style": adapter.style_phrase})
            write_file(path, file)
            refresh_adapter_names()
            lines.insert(1, f"saved as {path.name}")
        info = "\n".join(lines)
        logger.info(lines[0])
        show_text(cls.hidden.unique_id, info)
        return io.NodeOutput(AdapterTensors(file), info)
