"""``stylewright inspect`` and ``stylewright convert``: adapter files."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .generate import weights_of
from .output import Json, show

if TYPE_CHECKING:
    from ..formats.adapters import AdapterReport
    from ..formats.whole import WholeReport

DTYPES = ("float32", "bfloat16", "float16")
LONGEST_VALUE = 100  # characters of a metadata entry that are shown


def inspect(
    file: Annotated[
        Path, typer.Argument(help="An adapter's .safetensors file, of any tool, or a student's with all weights.")
    ],
    as_json: Json = False,
) -> None:
    """Say what an adapter file is: method, rank, layers, base model, key style, metadata."""
    from ..formats.adapters import inspect_adapter
    from ..formats.whole import inspect_whole, is_whole

    report = inspect_whole(file) if is_whole(file) else inspect_adapter(file)
    show(dataclasses.asdict(report), lines_of(report), as_json)


def lines_of(report: "AdapterReport | WholeReport") -> Iterator[str]:
    """The report for people."""
    for field in dataclasses.fields(report):
        value = getattr(report, field.name)
        if field.name != "metadata" and value not in (None, "", ()):
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"{field.name.replace('_', ' '):22}{text}"
    for name, value in sorted(report.metadata.items()):
        yield f"  {name} = {value if len(value) <= LONGEST_VALUE else value[:LONGEST_VALUE] + ' …'}"


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The adapter's .safetensors file, of any tool.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    style: Annotated[str, typer.Option(help="Key style of OUT: kohya, diffusers, comfyui or peft.")],
    family: Annotated[
        str | None, typer.Option(help="flux, sd3, sdxl, sd15, pixart. (default: as the file says)")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model; DoRA and OFT need its weights in some styles.")
    ] = None,
    components: Annotated[Path | None, typer.Option(help="See `stylewright train`.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. (default: as it is)")] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter with the key names of another tool; every tensor is carried over."""
    import torch

    from ..formats.adapters import convert_adapter

    weights = None
    if model is not None:
        from ..hosts.loading import load_host

        weights = weights_of(load_host(model, components=components))
    if dtype not in (None, *DTYPES):
        raise ValueError(f"Got --dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    kind = None if dtype is None else getattr(torch, dtype)
    convert_adapter(source, target, style, family=family, weights=weights, dtype=kind)
    show({"file": target, "style": style}, [f"wrote {target} in {style} style"], as_json)
