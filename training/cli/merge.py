"""``stylewright merge``: the student between two."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .generate import Components
from .output import Json, show

if TYPE_CHECKING:
    from torch import Tensor


def merge(
    first: Annotated[Path, typer.Argument(metavar="A", help="A one-step student's file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another of the same model, called at the same time.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    weight: Annotated[float, typer.Option(help="Share of A; the rest is B's.")] = 0.5,
    rank: Annotated[
        int | None, typer.Option(help="Lower the rank to this afterwards. (default: the sum of both ranks, exactly)")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of an adapter and a student with all weights: what the adapter is on.")
    ] = None,
    components: Components = None,
    as_json: Json = False,
) -> None:
    """Write the one-step student whose weights are between those of two, as SwiftBrush v2 does.

    Two adapters make an adapter. With a student that has all weights, all weights come out.
    """
    from ..formats.merging import merge_students
    from ..formats.resizing import Cut

    if target.suffix != ".safetensors":
        raise ValueError(f"{target} would be no file that others open: expected a name that ends in .safetensors")
    if target.exists():
        raise ValueError(f"{target} is there already: name a new file to write, or remove that one before")
    if components is not None and model is None:
        raise ValueError("Got --components without --model, the checkpoint that it completes: give both, or neither")
    cut = None if rank is None else Cut(value=rank)
    changed = None if model is None else partial(changed_weights, model, components)
    made = merge_students(first, second, target, weight, cut, changed=changed)
    said = f"wrote {target}, {made}: {weight:g} of {first} and {1 - weight:g} of {second}"
    show({"file": target, "made": made}, [said], as_json)


def changed_weights(model: str, components: str | None, adapter: Path) -> "dict[str, Tensor]":
    """All weights of the model with the change of an adapter's file, in float32. ValueError where they do not fit."""
    from ..hosts.loading import load_host
    from ..hosts.whole import merged_weights
    from .train import loaded_for

    host = load_host(model, components=components)
    return merged_weights(host.denoiser, loaded_for(host, adapter), str(adapter))
