"""What an adapter's parameters are at the start: peft's laws, whatever the model's type and device."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..bottleneck import DOWN_STD
from ..style_inject import ROUTER_STD
from .methods import AdapterConfig

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

# Zero at the start, so that the adapter does nothing: parts of peft's parameter names. The rest is drawn.
# DoRA's magnitudes are measured afterwards.
ZERO_AT_START = {"lora_B", "hada_w2_b", "lokr_w1", "lokr_w1_a", "oft_R", "lora_magnitude_vector"}
ZERO_AT_START |= {"styleinject_B", "styleinject_r", "bottleneck_up", "bottleneck_shared_up", "bottleneck_u"}
NEAR_ZERO = {"bottleneck_down", "bottleneck_shared_down", "bottleneck_d"}


@torch.no_grad()
def initialise(
    name: str,
    tensor: nn.Parameter,
    config: AdapterConfig,
    source: torch.Generator,
    dtype: torch.dtype,
    device: torch.device | None,
) -> None:
    """peft's initial laws, drawn in float32 on the CPU whatever the model's type and device."""
    drawn = torch.zeros(tensor.shape)
    parts = set(name.split("."))
    if config.init == "gaussian" and parts & {"lora_A", "styleinject_A"}:
        drawn.normal_(std=1 / config.rank, generator=source)
    elif parts & NEAR_ZERO:
        nn.init.trunc_normal_(drawn, std=DOWN_STD, a=-2 * DOWN_STD, b=2 * DOWN_STD, generator=source)
    elif "styleinject_R" in parts:
        drawn.normal_(std=ROUTER_STD, generator=source)
    elif not parts & ZERO_AT_START:
        branches = drawn.flatten(0, 1) if "styleinject_A" in parts else drawn
        nn.init.kaiming_uniform_(branches, a=5**0.5, generator=source)
    tensor.data = drawn.to(device or tensor.device, dtype)


@torch.no_grad()
def measure_magnitudes(layer: "BaseTunerLayer") -> None:
    """DoRA's magnitudes in the adapter's type. peft takes them in the weights', where their ratio is not quite 1."""
    for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
        weight = layer.get_base_layer().weight.to(magnitude.weight.dtype)
        norms = magnitude.get_weight_norm(weight=weight, lora_weight=torch.zeros_like(weight), scaling=1.0)
        magnitude.weight.copy_(norms)
