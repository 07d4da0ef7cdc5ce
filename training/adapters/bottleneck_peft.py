"""FineStyle's bottleneck (:mod:`..bottleneck`) as a method of peft. Imported where it is used, for it imports peft."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from ..bottleneck import DOWN_STD, bottleneck
from .peft_registry import register

NAME = "bottleneck"


@dataclass
class BottleneckConfig(PeftConfig):
    """Of :class:`BottleneckModel`, in peft's terms."""

    r: int = field(default=32, metadata={"help": "Width of the bottleneck."})
    alpha: float = field(default=32.0, metadata={"help": "What is added is scaled by alpha / r."})
    ranks: dict[str, int] = field(default_factory=dict, metadata={"help": "Widths of layers that have others."})
    dropout: float = field(default=0.0, metadata={"help": "Of the bottleneck's input."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers, as peft names them."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers that are left out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME.upper())


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer or convolution, and the bottleneck behind it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ParameterDict(), nn.ParameterDict()
        self.bottleneck_dropout, self.scaling = nn.ModuleDict(), {}
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, name: str) -> None:
        """One more adapter on this layer."""
        base: Any = self.get_base_layer()
        features, width = base.out_channels if _is_convolution(base) else base.out_features, config.r
        width = config.ranks.get(name, width)
        self.bottleneck_down[adapter_name] = nn.Parameter(torch.randn(width, features) * DOWN_STD)
        self.bottleneck_up[adapter_name] = nn.Parameter(torch.zeros(features, width))
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.scaling[adapter_name] = config.alpha / config.r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        total, channels = result, 1 if _is_convolution(self.get_base_layer()) else -1
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                y = self.bottleneck_dropout[name](result)
                added = bottleneck(y, self.bottleneck_down[name], self.bottleneck_up[name], channels)
                total = total + self.scaling[name] * added
        return total


class BottleneckModel(BaseTuner):
    """Puts :class:`BottleneckLayer` around the layers that a :class:`BottleneckConfig` names."""

    prefix = f"{NAME}_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **unused: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        if not isinstance(target, nn.Linear | nn.Conv1d | nn.Conv2d):
            raise ValueError(f"a bottleneck is behind linear layers and convolutions: {current_key} is {type(target)}")
        layer = BottleneckLayer(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d)


register(NAME, BottleneckConfig, BottleneckModel)
