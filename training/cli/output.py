"""What a command leaves on stdout: text for people, or one JSON object for machines. Progress goes to stderr."""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def show(result: Mapping[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Prints ``result`` as JSON, or ``lines``."""
    if as_json:
        typer.echo(json.dumps(result, allow_nan=False, default=str))
        return
    for line in lines:
        typer.echo(line)
