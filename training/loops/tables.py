"""Frozen dataclasses as plain nested tables, for TOML, JSON and the command line: the same names everywhere.

A field that is None is left out, because TOML has no null; its default must therefore be None.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_table(config: Any) -> dict[str, Any]:
    """A dataclass as dicts, lists and plain values."""
    fields = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: _plain(value) for name, value in fields if value is not None}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_table(kind: type[T], table: Mapping[str, Any], place: str = "") -> T:
    """The inverse of :func:`to_table`. ValueError names an unknown key with the nearest valid one, and a wrong type.

    ``place`` is where the table stands in a larger one, for example ``"adapter."``.
    """
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            advice = f"did you mean {place}{near[0]}?" if near else f"expected one of {', '.join(sorted(hints))}."
            raise ValueError(f"Unknown option {place}{key}: {advice}")
    table = {key: _completed(kind, key, value) for key, value in table.items()}
    return kind(**{key: _typed(value, hints[key], place + key) for key, value in table.items()})


def _completed(kind: Any, key: str, value: Any) -> Any:
    """A table of a dataclass in a dataclass: what it does not say is as in the outer one's default."""
    (factory,) = (field.default_factory for field in dataclasses.fields(kind) if field.name == key)
    default = factory() if factory is not dataclasses.MISSING and isinstance(value, Mapping) else None
    return {**to_table(default), **value} if dataclasses.is_dataclass(default) else value


def _typed(value: Any, hint: Any, place: str) -> Any:
    """``value`` as ``hint`` wants it: tables become dataclasses, lists tuples, integers floats, all else stays."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_table(hint, value, place + ".")
    if get_origin(hint) in (Union, types.UnionType):
        return _first_that_fits(value, get_args(hint), place)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(item, get_args(hint)[0], place) for item in value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"Got {value!r} for {place}: expected {getattr(hint, '__name__', hint)}.")


def _first_that_fits(value: Any, hints: tuple[Any, ...], place: str) -> Any:
    for hint in hints:
        try:
            return _typed(value, hint, place)
        except ValueError:
            continue
    expected = " or ".join(getattr(hint, "__name__", str(hint)) for hint in hints if hint is not type(None))
    raise ValueError(f"Got {value!r} for {place}: expected {expected}.")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two nested tables, by dotted name; None stands for what a table lacks."""
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    pairs = {name: (flat_old.get(name), flat_new.get(name)) for name in {**flat_old, **flat_new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield place + key, value
