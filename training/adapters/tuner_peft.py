"""Adapter methods of our own among peft's: what they share, and how peft knows them by name, so that it configures,
injects, saves and loads them.

peft's ``register_peft_method`` takes names of its enumeration of types only, which has to be extended first.
"""

from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import nn


class WrappingTuner(BaseTuner):
    """Puts its ``tuner_layer_cls(layer, adapter name, config, layer's name)`` around the layers that are asked for."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **unused: Any,
    ) -> None:
        wrapper: Any = self.tuner_layer_cls
        if isinstance(target, wrapper):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        if not isinstance(target, nn.Linear | nn.Conv1d | nn.Conv2d):
            method = self.prefix.rstrip("_")
            raise ValueError(f"{method} adapts linear layers and convolutions, and {current_key} is a {type(target)}")
        layer = wrapper(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d)


def register(name: str, config: type, model: type) -> None:
    """Makes a method known under ``name``, in small letters; its tensors' names begin with ``<name>_``."""
    if name.upper() not in list(PeftType):
        _extend(PeftType, name.upper())
        register_peft_method(name=name, config_cls=config, model_cls=model)


def _extend(kind: Any, value: str) -> None:
    """Adds a member to an enumeration of texts, whose name is its value."""
    member = str.__new__(kind, value)
    member._name_ = member._value_ = value
    setattr(kind, value, member)
    kind._member_names_.append(value)
    kind._member_map_[value] = kind._value2member_map_[value] = member
