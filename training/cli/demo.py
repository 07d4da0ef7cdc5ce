"""``stylewright demo``: a style learned from one picture, under two laws, as a page to look at."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .output import Json, show
from .progress import progress_bar


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page, the pictures and results.json.")] = Path("demo"),
    style: Annotated[
        str, typer.Option(help="A style that the model has never seen: regatta, herbarium, …")
    ] = "regatta",
    image: Annotated[Path | None, typer.Option(help="Learn from this picture instead.")] = None,
    subject: Annotated[str, typer.Option(help="What the picture shows: circle, star, house, …")] = "star",
    steps: Annotated[int, typer.Option(help="Optimizer steps under each law.")] = 60,
    seed: Annotated[int, typer.Option(help="The same seed gives the same page.")] = 0,
    as_json: Json = False,
) -> None:
    """Learn a style from one picture with the embedded model, and compare two laws of the noise level."""
    from ..demo.experiment import DemoOptions, run_experiment, write_results
    from ..demo.report import write_report

    began = time.monotonic()
    options = DemoOptions(style=style, image=image, subject=subject, steps=steps, seed=seed)
    with progress_bar() as update:
        experiment = run_experiment(options, out, lambda law, done, total: update(f"learning, {law} law", done, total))
    results = write_results(experiment, out / "results.json")
    page = write_report(experiment, out)
    lines = [
        *(
            f"{name:15} style {law['style_score']:.2f}, subject {law['subject_score']:.2f}, {law['seconds']:.1f} s"
            for name, law in results["laws"].items()
        ),
        f"page     {page}",
        f"figures  {out / 'results.json'}",
        f"all of it took {time.monotonic() - began:.0f} s",
    ]
    show({"page": page, **results}, lines, as_json)
