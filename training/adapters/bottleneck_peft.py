"""FineStyle's bottleneck (:mod:`..bottleneck`) as a method of peft. Imported where it is used, for it imports peft."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from ..bottleneck import DOWN_STD, bottleneck, own_factors
from .tuner_peft import WrappingTuner, is_convolution, register

NAME = "bottleneck"


@dataclass
class BottleneckConfig(PeftConfig):
    """Of :class:`BottleneckModel`, in peft's terms."""

    r: int = field(default=32, metadata={"help": "Width of the bottleneck."})
    alpha: float = field(default=32.0, metadata={"help": "What is added is scaled by alpha / r."})
    shared: bool = field(default=False, metadata={"help": "Projections in common, and vectors for each layer."})
    parts: dict[str, list[list[int]]] = field(
        default_factory=dict, metadata={"help": "Outputs of layers that have a bottleneck for each of several parts."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Of the bottleneck's input."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers, as peft names them."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers that are left out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME.upper())


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer or convolution, and the bottleneck behind it."""

    adapter_layer_names = (
        *("bottleneck_down", "bottleneck_up"),
        *("bottleneck_d", "bottleneck_u", "bottleneck_shared_down", "bottleneck_shared_up"),  # where they share
    )
    acts_by_input = True  # and so is no change of weights
    other_param_names = ("scaling", "parts", "bearers")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        for each in self.adapter_layer_names:
            setattr(self, each, nn.ParameterDict())
        self.bottleneck_dropout, self.scaling = nn.ModuleDict(), {}
        self.parts: dict[str, list[range]] = {}
        self.bearers: dict[str, BottleneckLayer] = {}  # who has what is shared
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, name: str) -> None:
        """One more adapter on this layer."""
        base: Any = self.get_base_layer()
        features = base.out_channels if is_convolution(base) else base.out_features
        parts = [range(*part) for part in config.parts.get(name, [[0, features]])]
        width = len(parts) * config.r
        self.parts[adapter_name] = parts
        if config.shared:
            self.bottleneck_d[adapter_name] = nn.Parameter(torch.randn(features) * DOWN_STD)
            self.bottleneck_u[adapter_name] = nn.Parameter(torch.zeros(width))
        else:
            self.bottleneck_down[adapter_name] = nn.Parameter(torch.randn(width, features) * DOWN_STD)
            self.bottleneck_up[adapter_name] = nn.Parameter(torch.zeros(features, width))
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.scaling[adapter_name] = config.alpha / config.r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def bear(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Has the projections that this layer and others share."""
        features = len(self.parts[adapter_name][0])
        self.bottleneck_shared_down[adapter_name] = nn.Parameter(torch.randn(config.r, features) * DOWN_STD)
        self.bottleneck_shared_up[adapter_name] = nn.Parameter(torch.zeros(features, config.r))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """W_down and W_up of this layer, with zeros between its parts."""
        if adapter_name not in self.bearers:
            return self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]
        vectors = (self.bottleneck_d[adapter_name], self.bottleneck_u[adapter_name])
        bearer = self.bearers[adapter_name]
        shared = (bearer.bottleneck_shared_down[adapter_name], bearer.bottleneck_shared_up[adapter_name])
        return own_factors(*(each.to(vectors[0].device) for each in shared), *vectors, self.parts[adapter_name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        total, channels = result, 1 if is_convolution(self.get_base_layer()) else -1
        for name in self.active_adapters:
            if name in self.scaling:
                y = self.bottleneck_dropout[name](result)
                added = bottleneck(y, *self.factors(name), channels)
                total = total + self.scaling[name] * added
        return total


class BottleneckModel(WrappingTuner):
    """Puts :class:`BottleneckLayer` around the layers that a :class:`BottleneckConfig` names."""

    prefix = f"{NAME}_"
    tuner_layer_cls = BottleneckLayer

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        """The first layer of a width has what all of them share."""
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, **options)
        if not peft_config.shared:
            return
        layer: Any = getattr(parent, target_name)
        width = len(layer.parts[adapter_name][0])
        others = (each for each in self.model.modules() if isinstance(each, BottleneckLayer))
        for bearer in (each.bearers[adapter_name] for each in others if adapter_name in each.bearers):
            if len(bearer.parts[adapter_name][0]) == width:
                layer.bearers[adapter_name] = bearer
                return
        layer.bear(adapter_name, peft_config)
        layer.bearers[adapter_name] = layer


register(NAME, BottleneckConfig, BottleneckModel)
