"""Flags made from dataclasses, so that the command line and the TOML file have the same names.

A field of a dataclass is a key of the file and a flag: ``learning_rate = 1e-4`` is ``--learning-rate 1e-4``. A field
of a nested dataclass is a dotted key, ``adapter.rank = 8`` or ``rank = 8`` in the table ``[adapter]``; its flag
is ``--adapter.rank 8``, and also the bare ``--rank 8``.
"""

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer


@dataclass(frozen=True)
class Flag:
    """One option of the command line."""

    path: tuple[str, ...]  # ("adapter", "rank")
    hint: Any  # of the field
    help: str
    panel: str

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The members of a union without None, or the one type."""
        union = get_origin(self.hint) in (Union, types.UnionType)
        return tuple(kind for kind in get_args(self.hint) if kind is not type(None)) if union else (self.hint,)

    @property
    def parsed_as(self) -> Any:
        """The type that typer is asked for: a list where the field may be a tuple."""
        tuples = [kind for kind in self.kinds if get_origin(kind) is tuple]
        return types.GenericAlias(list, get_args(tuples[0])[:1]) if tuples else self.kinds[0]

    @property
    def parameter(self) -> str:
        return "__".join(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """("--adapter.rank", "--rank")"""
        words = [part.replace("_", "-") for part in self.path]
        return tuple(dict.fromkeys((f"--{'.'.join(words)}", f"--{words[-1]}")))

    def value(self, parsed: Any) -> Any:
        """What goes into the table. Where a field takes a word or several texts, one plain word is the word."""
        if str in self.kinds and isinstance(parsed, list) and len(parsed) == 1 and re.fullmatch(r"[\w-]+", parsed[0]):
            return parsed[0]
        return parsed


def flags_of(
    kind: Any, helps: Mapping[str, str], panel: str, path: tuple[str, ...] = (), preset: Any = None
) -> Iterator[Flag]:
    """The flags of a dataclass and of those in it; ``helps`` has a line for each dotted name, with its default.

    ``preset``: one whose values are the defaults; None = those of the class.
    """
    for field in dataclasses.fields(kind):
        hint = get_type_hints(kind)[field.name]
        here = (*path, field.name)
        if any(map(dataclasses.is_dataclass, get_args(hint))):
            continue  # a list of tables: in a file only
        if dataclasses.is_dataclass(hint):
            inner = None if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield from flags_of(hint, helps, f"{panel}: {field.name}", here, inner)
        else:
            text = helps[".".join(here)]
            default = field.default if preset is None else getattr(preset, field.name)
            stated = "" if default in (None, "", (), dataclasses.MISSING) else f" (default: {default})"
            yield Flag(here, hint, text + stated, panel)


def with_flags(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command these flags. It receives those that were used as its first argument, a nested table."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            given = {flag.path: flag.value(values.pop(flag.parameter)) for flag in flags}
            command(nest({path: value for path, value in given.items() if value not in (None, [])}), **values)

        own = list(inspect.signature(command).parameters.values())[1:]
        signature = inspect.Signature([*own, *map(_parameter, flags)])
        described: Any = call  # typer reads these
        described.__signature__ = signature
        described.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        return call

    return decorate


def _parameter(flag: Flag) -> inspect.Parameter:
    declared = flag.names
    if flag.parsed_as is bool:
        declared = tuple(f"{name}/--no-{name.removeprefix('--')}" for name in declared)
    option = typer.Option(*declared, help=flag.help, rich_help_panel=flag.panel, show_default=False)
    return inspect.Parameter(
        flag.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[flag.parsed_as | None, option],
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
