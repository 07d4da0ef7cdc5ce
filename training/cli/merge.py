"""``stylewright merge``: the student between two."""

from pathlib import Path
from typing import Annotated

import typer

from .output import Json, show


def merge(
    first: Annotated[Path, typer.Argument(metavar="A", help="A one-step student's file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another of the same model, called at the same time.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    weight: Annotated[float, typer.Option(help="Share of A; the rest is B's.")] = 0.5,
    rank: Annotated[
        int | None, typer.Option(help="Lower the rank to this afterwards. (default: the sum of both ranks, exactly)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the one-step student whose weights are between those of two, as SwiftBrush v2 does."""
    from ..formats.merging import merge_students
    from ..formats.resizing import Cut

    if target.exists():
        raise ValueError(f"{target} is there already: name a new file to write, or remove that one before")
    made = merge_students(first, second, target, weight, None if rank is None else Cut(value=rank))
    said = f"wrote {target}, {made}: {weight:g} of {first} and {1 - weight:g} of {second}"
    show({"file": target, "made": made}, [said], as_json)
