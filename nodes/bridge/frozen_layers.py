"""The weights of ComfyUI's layers, in whatever form they are kept: for :mod:`...training.frozen`.

ComfyUI makes the weight of a call from the stored one: moved, cast, dequantised, patched. Packs bring classes of their
own that derive from its; those of ComfyUI-GGUF are known here, and every other class that multiplies in its own way
is run again in the backward pass instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...training.frozen import PLAIN, Dense

GGUF = "GGMLLayer"  # base class of ComfyUI-GGUF's layers


class ComfyWeights:
    """What ComfyUI's layers compute with on ``device``, where the model is sampled."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def as_stored(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
        if _is_dynamic(layer) or _is_patched(layer) or not PLAIN.as_stored(layer, dtype, device):
            return False
        return layer.bias is None or layer.get_parameter("bias").device == device

    def is_product(self, layer: nn.Module) -> bool:
        return PLAIN.is_product(layer) or _is_gguf(layer) or _casts_by_comfy(layer)

    @contextmanager
    def dense(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[Dense]:
        if _is_gguf(layer):
            packed: Any = layer
            weight, bias = packed.cast_bias_weight(dtype=dtype, device=device, bias_dtype=dtype)
            yield Dense(weight, bias)
        elif not isinstance(layer, comfy.ops.CastWeightBiasOp):
            with PLAIN.dense(layer, dtype, device) as dense:
                yield dense
        else:
            weight, bias, stream = comfy.ops.cast_bias_weight(
                layer, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True
            )
            try:
                yield Dense(_smoothed(layer, _dequantised(weight).to(dtype)), bias)
            finally:
                comfy.ops.uncast_bias_weight(layer, weight, bias, stream)

    def device(self, layer: nn.Module) -> torch.device:
        return self._device


def _casts_by_comfy(layer: nn.Module) -> bool:
    """Whether both ways that a layer's class has to multiply are ComfyUI's own."""
    origins = {_origin(type(layer), name) for name in ("forward", "forward_comfy_cast_weights")}
    return origins == {comfy.ops.__name__}


def _origin(kind: type, method: str) -> str | None:
    """The module of the class that defines what ``kind`` calls ``method``."""
    return next((base.__module__ for base in kind.__mro__ if method in vars(base)), None)


def _is_gguf(layer: nn.Module) -> bool:
    return any(kind.__name__ == GGUF for kind in type(layer).__mro__)


def _is_dynamic(layer: nn.Module) -> bool:
    """Whether the weight is a page of dynamic VRAM, which is somebody else's after the call."""
    return "_v" in vars(layer)


def _is_patched(layer: nn.Module) -> bool:
    """Whether patches are applied in every call, as to weights that stay off the device."""
    return isinstance(layer, comfy.ops.CastWeightBiasOp) and bool(layer.weight_function or layer.bias_function)


def _dequantised(weight: Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def _smoothed(layer: nn.Module, weight: Tensor) -> Tensor:
    """With the scale that ModelOpt's formats multiply the inputs with (AWQ)."""
    scale = layer._parameters.get("pre_quant_scale")
    return weight if scale is None else weight * scale.to(weight.device, weight.dtype)
