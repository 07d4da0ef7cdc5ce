"""The nodes: thin files over the training core, which they reach through :mod:`.bridge`."""

from comfy_api.latest import ComfyExtension, io

from .bridge.board import serve_runs
from .bridge.outlines import serve_outlines
from .combine import CombineDatasetsNode
from .concept_crops import ConceptCrops
from .dataset import StyleDatasetNode
from .density import StyleDensityNode
from .distiller import PGSBDistiller
from .embedded_model import EmbeddedModelNode
from .guider import StyleGuider
from .lora_approximate import StyleInjectToLoRA
from .lora_loader import StyleLoRALoader
from .lora_resize import StyleLoRAResize
from .negative import NASANegativeAttention
from .one_step import OneStepSampler, OneStepSamplerParts
from .prompt_switch import CFGByLogSNR, PromptSwitchByLogSNR
from .reference import ReferenceNode
from .trainer import StyleFriendlySNRTrainer

NODES: tuple[type[io.ComfyNode], ...] = (
    EmbeddedModelNode,
    ReferenceNode,
    StyleDatasetNode,
    CombineDatasetsNode,
    ConceptCrops,
    StyleDensityNode,
    StyleFriendlySNRTrainer,
    PGSBDistiller,
    StyleLoRALoader,
    StyleLoRAResize,
    StyleInjectToLoRA,
    OneStepSampler,
    OneStepSamplerParts,
    PromptSwitchByLogSNR,
    CFGByLogSNR,
    StyleGuider,
    NASANegativeAttention,
)


class Stylewright(ComfyExtension):
    """What ComfyUI asks for our nodes."""

    async def on_load(self) -> None:
        serve_runs()
        serve_outlines()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


def extension() -> Stylewright:
    return Stylewright()
