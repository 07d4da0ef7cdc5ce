"""From an experiment to a page of pictures."""

import math
from pathlib import Path

from torch import Tensor

from ..density_presets import build_density
from ..embedded.renderer import SIZE, SUBJECTS
from .experiment import FREE_WORD, LAWS, Experiment, LawResult
from .figures import plot_curves, plot_densities, save_strip
from .page import Row, write_page
from .scoring import Score, other_subjects

TOKENS = (SIZE // 16) ** 2  # of a picture of the embedded model
EVERYWHERE = (-math.inf, math.inf)  # range of log_snr


def write_report(experiment: Experiment, out: Path) -> Path:
    """Pictures, plots and ``index.html`` in the folder ``out``; returns the page."""
    rows = _strips(experiment, out)
    plot_densities(out / "densities.png", {name: build_density(law, EVERYWHERE, TOKENS) for name, law in LAWS.items()})
    laws = experiment.laws
    plot_curves(out / "loss.png", {name: _losses(law) for name, law in laws.items()}, ("step", "loss"))
    for what in ("style", "subject"):
        curves = {name: _scores(experiment, law, what) for name, law in laws.items()}
        plot_curves(out / f"{what}.png", curves, ("step", f"{what} score"))
    page = out / "index.html"
    write_page(
        page,
        title="A style learned from one picture",
        introduction=_introduction(experiment),
        rows=rows,
        plots=("densities.png", "loss.png", "style.png", "subject.png"),
        table=_table(experiment),
    )
    return page


def _strips(experiment: Experiment, out: Path) -> list[Row]:
    options = experiment.options
    detail = f"all that training sees: a {options.subject}"
    rows = [_strip(out, "reference", "Reference", detail, experiment.reference[None])]
    if experiment.truth is not None:
        rows.append(_strip(out, "truth", "The truth", "what a perfect answer looks like", experiment.truth))
    rows.append(_strip(out, "before", "Before", _in_words(experiment.before.score), experiment.before.pictures))
    for name, law in experiment.laws.items():
        for look in law.looks:
            title = f"{name}, step {look.step}"
            rows.append(_strip(out, f"{name}-{look.step:04}", title, _in_words(look.score), look.pictures))
    return rows


def _strip(out: Path, name: str, title: str, detail: str, pictures: Tensor) -> Row:
    save_strip(out / f"{name}.png", pictures)
    return Row(title, detail, f"{name}.png")


def _in_words(score: Score) -> str:
    return f"style {score.style:.2f}, subject {score.subject:.2f}"


def _introduction(experiment: Experiment) -> str:
    options = experiment.options
    others = ", ".join(SUBJECTS[i] for i in other_subjects(SUBJECTS.index(options.subject)))
    kind = f"a style that the model has never seen ({options.style})" if options.image is None else str(options.image)
    return (
        f"One picture of {kind} was shown to the embedded model for {options.steps} steps, as “{options.subject} in "
        f"{FREE_WORD} style”, twice from the same seed: with noise levels drawn from the style-friendly law, and from "
        f"SD3's, both stated for 1024x1024 pictures and carried to this size. Each row then asks for the subjects that "
        f"the picture does not show ({others}) in {FREE_WORD} style."
    )


def _table(experiment: Experiment) -> list[list[str]]:
    head = ["", "style score", "subject score", "seconds of training"]
    before = experiment.before.score
    rows = [["before", f"{before.style:.2f}", f"{before.subject:.2f}", ""]]
    for name, law in experiment.laws.items():
        score = law.looks[-1].score
        rows.append([name, f"{score.style:.2f}", f"{score.subject:.2f}", f"{law.seconds:.1f}"])
    return [head, *rows]


def _losses(law: LawResult) -> list[tuple[float, float]]:
    return [(event.step, event.loss) for event in law.history]


def _scores(experiment: Experiment, law: LawResult, what: str) -> list[tuple[float, float]]:
    looks = [experiment.before, *law.looks]
    return [(look.step, getattr(look.score, what)) for look in looks]
