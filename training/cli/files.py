"""``stylewright inspect`` and ``stylewright convert``: adapter files."""

from pathlib import Path
from typing import Annotated

import typer

from .output import Json, show


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter's .safetensors file.")],
    as_json: Json = False,
) -> None:
    """Say what an adapter file is: method, rank, targets, base model, density, key style."""
    import dataclasses

    from ..formats.adapters import inspect_adapter

    report = dataclasses.asdict(inspect_adapter(file))
    width = max(map(len, report))
    show(report, [f"{name:{width}}  {value}" for name, value in report.items()], as_json)


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The adapter's .safetensors file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    style: Annotated[str, typer.Option(help="Key style of OUT: kohya, diffusers, comfyui or peft.")],
    as_json: Json = False,
) -> None:
    """Write an adapter with the key names of another tool; every tensor is carried over."""
    from ..formats.adapters import convert_adapter

    convert_adapter(source, target, style)
    show({"file": target, "style": style}, [f"wrote {target} in {style} style"], as_json)
