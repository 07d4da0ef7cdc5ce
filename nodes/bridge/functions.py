"""What functions that other nodes put on a model are told by, over restarts: names, and the plain values they hold.

A node's strength is in the closure of its function, in the arguments of a partial one, or in the object that a method
is of. Addresses, devices and whole models tell nothing. Nor does what changes while a function is used (counters,
caches): of a closure its first state that is seen counts, of an object only what its constructor was given.
"""

import dis
import inspect
from collections.abc import Mapping
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_patcher
import torch
from torch import Tensor, nn

SAMPLES = 4  # numbers of each tensor

_first_seen: WeakKeyDictionary[FunctionType, list] = WeakKeyDictionary()


def traits(value: Any, around: tuple[Any, ...] = ()) -> Any:
    """A value as nested lists and dicts of texts, numbers and small tensors. ``around``: what it was found in."""
    if any(value is each for each in around):
        return "itself"
    within = (*around, value)
    match value:
        case None | bool() | int() | float() | str() | torch.dtype():
            return repr(value)
        case Tensor():
            return sample(value)
        case Mapping():
            return {_key(key): traits(part, within) for key, part in value.items() if not _is_place(key)}
        case list() | tuple():
            return [traits(part, within) for part in value]
        case set() | frozenset():
            return sorted(map(_key, value))
        case Enum():
            return str(value)
        case partial():
            return ["partial", traits(value.func, within), traits([value.args, value.keywords], within)]
        case MethodType():
            return [traits(value.__func__, within), traits(value.__self__, within)]
        case FunctionType():
            if value not in _first_seen:
                _first_seen[value] = [value.__qualname__, traits(_held(value), within)]
            return _first_seen[value]
        case type():
            return value.__qualname__
        case nn.Module() | comfy.model_patcher.ModelPatcher() | torch.device():
            return type(value).__qualname__
        case _:
            # An object in an object is most likely shared, and changes with others.
            return [type(value).__qualname__, {} if any(map(_is_object, around)) else traits(_given(value), within)]


def sample(tensor: Tensor) -> Tensor:
    """A few numbers of a tensor, evenly spaced, on the CPU."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.float32, copy=True)


def _held(function: FunctionType) -> dict[str, Any]:
    """A function's defaults and the variables around it, but those that it counts with."""
    held = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
    assigned = _assigned(function.__code__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name not in assigned and (content := _content(cell)) is not cell:
            held[name] = content
    return held


def _assigned(code: CodeType) -> set[str]:
    """The variables of an outer function that this one assigns, itself or in functions inside of it."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
    return own.union(*(_assigned(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _content(cell: Any) -> Any:
    """What a variable holds; the cell itself where nothing is assigned to it yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _given(thing: object) -> dict[str, Any]:
    """The attributes of an object that are named like its constructor's arguments."""
    try:
        arguments = inspect.signature(type(thing)).parameters
        state = vars(thing)
    except (TypeError, ValueError):  # of a type that is not written in Python
        return {}
    return {name: value for name, value in state.items() if name.lstrip("_") in arguments}


def _is_object(value: Any) -> bool:
    known = (Mapping, list, tuple, set, frozenset, partial, MethodType, FunctionType)
    return not isinstance(value, known)


def _is_place(key: Any) -> bool:
    return isinstance(key, torch.device)


def _key(key: Any) -> str:
    """Of a dict or a set: what it says, without addresses."""
    if isinstance(key, tuple):
        return f"({', '.join(map(_key, key))})"
    return repr(key) if isinstance(key, None | bool | int | float | str) else type(key).__qualname__
