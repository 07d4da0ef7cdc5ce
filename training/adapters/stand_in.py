"""What peft is shown instead of a layer that it does not know: a linear layer or a convolution over any weights.

peft takes torch's own classes, and looks at their weight for its type, device and shape, and for DoRA's norms. A
quantised layer is of another class, or its weight is packed bytes. A stand-in has the class, the sizes and, where a
method asks for them, the numbers; the work is the layer's.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..frozen import dense_weight, host_of, is_plain

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

GEOMETRY = (  # of a convolution
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


def needs_stand_in(layer: nn.Module) -> bool:
    """Whether ``layer`` is not what peft expects: torch's class over a weight that it computes with as it is stored."""
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return True
    weight, host = layer.weight, host_of(layer)
    return not is_plain(weight) or not host.as_stored(layer, weight.dtype, host.device(layer))


def stand_in(layer: nn.Module) -> "StandIn":
    """A stand-in for ``layer``, which becomes its part."""
    for kind, made in STAND_INS.items():
        if isinstance(layer, kind):
            return made(layer)
    return LinearStandIn(layer)


def base_weight(adapted: "BaseTunerLayer") -> Tensor:
    """The numbers of the frozen weight under one of peft's layers: in float32 where they are no plain matrix."""
    layer = adapted.get_base_layer()
    return dense_weight(layer.layer) if isinstance(layer, StandIn) else layer.weight


class StandIn(nn.Module):
    """A stand-in's ``weight`` holds no numbers, only their type, shape and place, unless ``shows_weights``."""

    def __init__(self, layer: Any, shape: tuple[int, ...]) -> None:
        nn.Module.__init__(self)  # and not that of torch's class, which makes a weight
        self.layer = layer
        self.shows_weights = False
        self._shape = shape

    @property
    def weight(self) -> Tensor:
        if self.shows_weights:
            return dense_weight(self.layer)
        return torch.zeros((), device=host_of(self.layer).device(self.layer)).expand(self._shape)

    @property
    def bias(self) -> Tensor | None:
        host = host_of(self.layer)
        with torch.no_grad(), host.dense(self.layer, torch.float32, host.device(self.layer)) as dense:
            return None if dense.bias is None else dense.bias.clone()

    def extra_repr(self) -> str:
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


class LinearStandIn(StandIn, nn.Linear):  # ty: ignore[incompatible-property-override]
    def __init__(self, layer: Any) -> None:
        super().__init__(layer, (layer.out_features, layer.in_features))
        self.in_features, self.out_features = layer.in_features, layer.out_features


class _ConvStandIn(StandIn):
    def __init__(self, layer: Any) -> None:
        super().__init__(layer, (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))
        for name in GEOMETRY:
            setattr(self, name, getattr(layer, name))


class Conv1dStandIn(_ConvStandIn, nn.Conv1d):  # ty: ignore[incompatible-property-override]
    pass


class Conv2dStandIn(_ConvStandIn, nn.Conv2d):  # ty: ignore[incompatible-property-override]
    pass


STAND_INS = {nn.Conv1d: Conv1dStandIn, nn.Conv2d: Conv2dStandIn}


def stand_ins(module: nn.Module, names: list[str]) -> list[StandIn]:
    """Puts stand-ins in the place of the layers that peft does not know."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    shown = []
    for name in names:
        layer = module.get_submodule(name)
        if not isinstance(layer, BaseTunerLayer) and needs_stand_in(layer):
            shown.append(stand_in(layer))
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, shown[-1])
    return shown
