"""FineStyle's bottleneck (:mod:`..bottleneck`) as a method of peft. Imported where it is used, for it imports peft."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from ..bottleneck import DOWN_STD, bottleneck
from .tuner_peft import WrappingTuner, is_convolution, register

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
        features, width = base.out_channels if is_convolution(base) else base.out_features, config.r
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
        total, channels = result, 1 if is_convolution(self.get_base_layer()) else -1
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                y = self.bottleneck_dropout[name](result)
                added = bottleneck(y, self.bottleneck_down[name], self.bottleneck_up[name], channels)
                total = total + self.scaling[name] * added
        return total


class BottleneckModel(WrappingTuner):
    """Puts :class:`BottleneckLayer` around the layers that a :class:`BottleneckConfig` names."""

    prefix = f"{NAME}_"
    tuner_layer_cls = BottleneckLayer


register(NAME, BottleneckConfig, BottleneckModel)
