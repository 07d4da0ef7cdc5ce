"""``stylewright embedded``: the model that ships with the project, rebuilt and measured."""

from pathlib import Path
from typing import Annotated

import typer

from .output import Json, show

app = typer.Typer(help="Rebuild or measure the embedded model.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder for the weights.")]


@app.command()
def build(
    out: Out,
    work: Annotated[Path | None, typer.Option(help="Folder for checkpoints and latents; default: OUT/work.")] = None,
    seed: int = 0,
    stage: Annotated[list[str] | None, typer.Option(help="Only these stages; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Rebuild data, autoencoder, oracle, text encoder and transformer from nothing. Continues where it stopped."""
    from ..embedded.pretrain.build import build as rebuild

    rebuild(work or out / "work", out, seed=seed, stages=tuple(stage) if stage else None)
    show({"out": str(out)}, [f"The weights are in {out}"], as_json)


@app.command()
def card(
    folder: Annotated[Path | None, typer.Option(help="Folder with the weights; default: the shipped ones.")] = None,
    pictures: Annotated[int, typer.Option(help="Pictures for each row of the table.")] = 500,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Measure the embedded model with the oracle and write its model card."""
    from ..embedded.pretrain.card import write_card
    from ..embedded.weights import FOLDER, Weights

    weights = Weights(folder or FOLDER)
    write_card(weights, seed=seed, n=pictures)
    path = weights.folder / "README.md"
    show({"card": str(path)}, [path.read_text(encoding="utf-8"), f"Written to {path}"], as_json)


@app.command()
def student_card(
    student: Annotated[Path | None, typer.Option(help="Its file; default: the shipped one.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder with the weights; default: the shipped ones.")] = None,
    pictures: Annotated[int, typer.Option(help="Pictures of the student for each kind of prompt.")] = 500,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Measure the one-step student beside its teacher with the oracle and write its card."""
    from ..embedded.weights import FOLDER, Weights
    from .student_card import write_student_card

    path = write_student_card(Weights(folder or FOLDER), student=student, n=pictures, seed=seed)
    show({"card": str(path)}, [path.read_text(encoding="utf-8"), f"Written to {path}"], as_json)
