"""StyleInject (:mod:`..style_inject`) as a method of peft. Imported where it is used, for it imports peft."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from ..style_inject import ROUTER_STD, Factors, style_injected
from .text_tokens import counted_tokens, reads_text
from .tuner_peft import WrappingTuner, is_convolution, register

NAME = "styleinject"


@dataclass
class StyleInjectConfig(PeftConfig):
    """Of :class:`StyleInjectModel`, in peft's terms."""

    r: int = field(default=4, metadata={"help": "Rank of each branch."})
    alpha: float = field(default=4.0, metadata={"help": "What is added is scaled by alpha / r."})
    branches: int = field(default=4, metadata={"help": "Down-projections that a router weighs."})
    injection: str = field(default="f2c", metadata={"help": "f2c, f1, f2 or lora: how the branches act."})
    dropout: float = field(default=0.0, metadata={"help": "Of the branches' input."})
    family: str = field(default="other", metadata={"help": "Of the model: what is known of its prompts' tokens."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers, as peft names them."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers that are left out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME.upper())


class StyleInjectLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer or convolution, and what StyleInject adds to its output."""

    adapter_layer_names = ("styleinject_A", "styleinject_B", "styleinject_R", "styleinject_r")
    acts_by_input = True  # and so is no change of weights
    other_param_names = ("scaling", "injection")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: StyleInjectConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        for each in self.adapter_layer_names:
            setattr(self, each, nn.ParameterDict())
        self.scaling: dict[str, float] = {}
        self.injection: dict[str, str] = {}
        self.styleinject_dropout = nn.ModuleDict()
        self.watch: Callable[[Tensor], None] | None = None  # gets the routing (b, n) of every call that learns
        self.observe: Callable[[Tensor, Tensor], None] | None = None  # gets the input, and what is added to the output
        self._reads_text, self._family = reads_text(name), config.family
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: StyleInjectConfig, name: str) -> None:
        """One more adapter on this layer."""
        base: Any = self.get_base_layer()
        n, r = config.branches, config.r
        if is_convolution(base):
            inputs, outputs, kernel = base.in_channels, base.out_channels, tuple(base.kernel_size)
        else:
            inputs, outputs, kernel = base.in_features, base.out_features, ()
        a = torch.randn(n, r, inputs, *kernel) / r  # each branch its own: equal ones would never part
        self.styleinject_A[adapter_name] = nn.Parameter(a)
        self.styleinject_B[adapter_name] = nn.Parameter(torch.zeros(outputs, r))
        self.styleinject_R[adapter_name] = nn.Parameter(torch.randn(n, inputs) * ROUTER_STD)
        self.styleinject_r[adapter_name] = nn.Parameter(torch.zeros(n))
        self.styleinject_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.scaling[adapter_name] = config.alpha / r
        self.injection[adapter_name] = config.injection
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        base: Any = self.get_base_layer()
        convolve = partial(_convolve, base) if is_convolution(base) else None
        counted = counted_tokens(x, self._family) if self._reads_text else None
        total = result
        for name in self.active_adapters:
            if name not in self.styleinject_A:
                continue
            added, shares = style_injected(
                self.styleinject_dropout[name](x),
                result,
                self._factors(name),
                self.injection[name],
                convolve=convolve,
                counted=counted,
            )
            if self.watch is not None and torch.is_grad_enabled():
                self.watch(shares)
            total = total + self.scaling[name] * added
        if self.observe is not None:
            self.observe(x, total - result)
        return total.to(result.dtype)

    def _factors(self, name: str) -> Factors:
        return Factors(*(getattr(self, each)[name] for each in self.adapter_layer_names))


class StyleInjectModel(WrappingTuner):
    """Puts :class:`StyleInjectLayer` around the layers that a :class:`StyleInjectConfig` names."""

    prefix = f"{NAME}_"
    tuner_layer_cls = StyleInjectLayer


def _convolve(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return layer._conv_forward(x, weight, None)


register(NAME, StyleInjectConfig, StyleInjectModel)
