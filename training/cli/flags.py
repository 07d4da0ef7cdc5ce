"""Flags made from dataclasses, so that the command line and the TOML file have the same names.

A field of a dataclass is a key of the file and a flag: ``learning_rate = 1e-4`` is ``--learning-rate 1e-4``. A field
of a nested dataclass is a dotted key, ``adapter.rank = 8`` or ``rank = 8`` in the table ``[adapter]``; its flag
is ``--adapter.rank 8``, and also the bare ``--rank 8``.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer


@dataclass(frozen=True)
class Flag:
    """One option of the command line."""

    path: tuple[str, ...]  # ("adapter", "rank")
    kind: Any  # what typer makes of the text: int, float, str, bool, Path, list[str]
    help: str
    panel: str

    @property
    def parameter(self) -> str:
        return "__".join(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """("--adapter.rank", "--rank")"""
        words = [part.replace("_", "-") for part in self.path]
        return tuple(dict.fromkeys((f"--{'.'.join(words)}", f"--{words[-1]}")))


def flags_of(kind: type, helps: Mapping[str, str], panel: str, path: tuple[str, ...] = ()) -> Iterator[Flag]:
    """The flags of a dataclass and of those in it; ``helps`` has a line for each dotted name, with its default."""
    for field in dataclasses.fields(kind):
        hint = get_type_hints(kind)[field.name]
        here = (*path, field.name)
        if dataclasses.is_dataclass(hint):
            yield from flags_of(hint, helps, f"{panel}: {field.name}", here)
        else:
            text = helps[".".join(here)]
            default = field.default
            stated = "" if default in (None, "", (), dataclasses.MISSING) else f" [default: {default}]"
            yield Flag(here, _parsed_as(hint), text + stated, panel)


def _parsed_as(hint: Any) -> Any:
    """The type that typer is asked for: the first of a union, and a list where the field is a tuple."""
    kinds = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    tuples = [kind for kind in kinds if get_origin(kind) is tuple]
    return list[get_args(tuples[0])[0]] if tuples else kinds[0]  # type: ignore[misc]


def with_flags(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command these flags. It receives those that were used as its first argument, a nested table."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            given = {flag.path: values.pop(flag.parameter) for flag in flags}
            command(nest({path: value for path, value in given.items() if value not in (None, [])}), **values)

        own = list(inspect.signature(command).parameters.values())[1:]
        signature = inspect.Signature([*map(_parameter, flags), *own])
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        return call

    return decorate


def _parameter(flag: Flag) -> inspect.Parameter:
    declared = flag.names
    if flag.kind is bool:
        declared = tuple(f"{name}/--no-{name.removeprefix('--')}" for name in declared)
    option = typer.Option(*declared, help=flag.help, rich_help_panel=flag.panel, show_default=False)
    return inspect.Parameter(
        flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[flag.kind | None, option]
    )


def nest(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """{("adapter", "rank"): 8} as {"adapter": {"rank": 8}}."""
    table: dict[str, Any] = {}
    for path, value in values.items():
        inner = table
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    return table


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables in one; where both have a value, that of ``above``."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
