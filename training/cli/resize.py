"""``stylewright resize``: an adapter at a lower rank."""

from pathlib import Path
from typing import Annotated

import typer

from .output import Json, show


def resize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The adapter's .safetensors file, of any tool.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    rank: Annotated[int | None, typer.Option(help="This rank for every layer; with another rule, the most.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The least rank that keeps this share of the squared singular values.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Keep singular values of at least the largest divided by this.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter at a lower rank, layer by layer the nearest there is, and say what is lost."""
    from ..formats.resizing import BY_ENERGY, BY_RANK, BY_RATIO, Cut, resize_adapter

    if energy is not None and ratio is not None:
        raise ValueError("Got both --energy and --ratio: expected one rule, with --rank as its limit if you like.")
    if energy is not None:
        cut = Cut(BY_ENERGY, energy, most=rank)
    elif ratio is not None:
        cut = Cut(BY_RATIO, ratio, most=rank)
    elif rank is not None:
        cut = Cut(BY_RANK, rank)
    else:
        raise ValueError("Got no rank: expected --rank, --energy or --ratio.")
    resized = resize_adapter(source, target, cut)
    ranks = {name: layer.rank for name, layer in resized.layers.items()}
    show(
        {"file": target, "ranks": ranks, "kept": dict(resized.kept)}, [f"wrote {target}: {resized.summary()}"], as_json
    )
