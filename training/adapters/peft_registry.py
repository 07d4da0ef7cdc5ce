"""Adapter methods of our own among peft's: known to it by name, so that it configures, injects, saves and loads them.

peft's ``register_peft_method`` takes names of its enumeration of types only, which has to be extended first.
"""

from typing import Any


def register(name: str, config: type, model: type) -> None:
    """Makes a method known under ``name``, in small letters; its tensors' names begin with ``<name>_``."""
    from peft.utils import PeftType, register_peft_method

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
