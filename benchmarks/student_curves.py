"""What the runs of ``one_step_students.py`` come to: tables with 95 % intervals over seeds, and a figure."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from package import load_package

load_package()

from sweep import shown  # noqa: E402

from stylewright.training.metrics import mean_interval  # noqa: E402

Rows = Sequence[dict[str, Any]]  # lines of runs.jsonl

SCORES = ("KID", "KID to guided", "recall", "subject", "whole style", "everything")
RESTLESS = ("KID", "recall", "everything")
NEGATIVE_SCORES = ("free", "subject", "palette")
BASE = "random"


def curve(row: dict[str, Any], name: str) -> list[float]:
    return [point[name] for point in row["scores"]["curve"]]


def last_half(values: Sequence[float]) -> Sequence[float]:
    return values[len(values) // 2 :]


def settled(values: Sequence[float]) -> float:
    """The mean of the last half."""
    return statistics.mean(last_half(values))


def oscillation(values: Sequence[float]) -> float:
    """The standard deviation over the last half."""
    return statistics.stdev(last_half(values))


def detrended(values: Sequence[float]) -> float:
    """The same around the line that fits the last half, which is no oscillation."""
    found = last_half(values)
    steps = range(len(found))
    slope, begin = statistics.linear_regression(steps, found)
    misses = (value - begin - slope * step for step, value in zip(steps, found, strict=True))
    return math.sqrt(sum(miss * miss for miss in misses) / (len(found) - 2))


def of_kind(rows: Rows, kind: str) -> dict[int, dict[str, Any]]:
    """Runs by seed."""
    return {row["arm"]["seed"]: row for row in rows if row["arm"]["kind"] == kind}


def kinds_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"]["kind"] for row in rows))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def by_kind(rows: Rows, measure: Any, names: Sequence[str]) -> list[list[str]]:
    """A line a kind: the measure of each curve, mean over seeds."""
    return [
        [kind, *(shown([measure(curve(row, name)) for row in of_kind(rows, kind).values()]) for name in names)]
        for kind in kinds_of(rows)
    ]


def in_pairs(rows: Rows, measure: Any, names: Sequence[str]) -> list[list[str]]:
    """The same, each run less the one of random scales for both with the same seed."""
    base, lines = of_kind(rows, BASE), []
    for kind in kinds_of(rows):
        mine = of_kind(rows, kind)
        pairs = [(mine[seed], base[seed]) for seed in sorted(mine.keys() & base.keys())]
        if kind != BASE:
            cells = [shown([measure(curve(a, name)) - measure(curve(b, name)) for a, b in pairs]) for name in names]
            lines.append([kind, *cells])
    return lines


def in_step(rows: Rows, names: Sequence[str]) -> list[list[str]]:
    """How curves go with those of random scales for both, by seeds that are the same or others: correlations."""
    base, lines = of_kind(rows, BASE), []
    for kind in kinds_of(rows):
        pairs = [(a, b) for a in of_kind(rows, kind).items() for b in base.items() if a[1] is not b[1]]
        for same in (True, False):
            mine = [(one, other) for (i, one), (j, other) in pairs if (i == j) == same]
            if mine:
                cells = [shown([found for a, b in mine for found in _correlation(a, b, name)]) for name in names]
                lines.append([kind, "the same" if same else "another", *cells])
    return lines


def _correlation(a: dict[str, Any], b: dict[str, Any], name: str) -> list[float]:
    """None where one of both never changes."""
    curves = curve(a, name), curve(b, name)
    return [statistics.correlation(*curves)] if all(len(set(values)) > 1 for values in curves) else []


def report(rows: Rows) -> str:
    seeds = sorted({row["arm"]["seed"] for row in rows})
    lines = [f"{len(rows)} runs, seeds {seeds}; mean and half the 95 % interval over seeds"]
    for title, measure, names in (
        ("mean over the last half of the evaluations", settled, SCORES),
        ("standard deviation over the last half", oscillation, RESTLESS),
        ("the same around a line", detrended, RESTLESS),
    ):
        lines += ["", title, "", *table(("scales", *names), by_kind(rows, measure, names))]
        lines += ["", f"less {BASE}, seed by seed", "", *table(("scales", *names), in_pairs(rows, measure, names))]
    lines += ["", f"correlation of whole curves with those of {BASE}", ""]
    lines += table(("scales", "seed", *RESTLESS), in_step(rows, RESTLESS))
    lines += ["", "negative prompt in the student's attention", ""]
    return "\n".join([*lines, *table(("student", "NASA", *NEGATIVE_SCORES), negatives(rows))])


def negatives(rows: Rows) -> list[list[str]]:
    lines = []
    for kind in kinds_of(rows):
        tests = [row["scores"]["negative"] for row in of_kind(rows, kind).values() if row["scores"]["negative"]]
        for same_scale in zip(*tests, strict=True):
            cells = [shown([test[name] for test in same_scale]) for name in NEGATIVE_SCORES]
            lines.append([kind, f"{same_scale[0]['scale']:g}", *cells])
    return lines


def draw(rows: Rows, path: Path) -> None:
    """Curves by iteration with their range over seeds, and the test of the negative prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    fixed = [kind for kind in kinds_of(rows) if kind == BASE or kind.startswith("fixed")]
    square = [kind for kind in kinds_of(rows) if kind in (BASE, "fixed 3", "random, frozen", "random, learning")]
    for line, kinds in zip(axes, (fixed, square), strict=True):
        for place, name in zip(line, ("KID", "everything"), strict=False):
            for kind in kinds:
                _curves(place, rows, kind, name)
            place.set(xlabel="iterations", ylabel=name)
        line[0].axhline(0, color="0.8", zorder=0)
        line[0].legend(fontsize=8)
    _bars(axes[0, 2], rows)
    _negative(axes[1, 2], rows)
    figure.savefig(path, dpi=110)


def _curves(axes: Any, rows: Rows, kind: str, name: str) -> None:
    runs = list(of_kind(rows, kind).values())
    steps, values = curve(runs[0], "step"), list(zip(*(curve(row, name) for row in runs), strict=True))
    (line,) = axes.plot(steps, [statistics.mean(each) for each in values], "k" if kind == BASE else "", label=kind)
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.12)


def _bars(axes: Any, rows: Rows) -> None:
    """Oscillation of KID, a point a run."""
    kinds = kinds_of(rows)
    for place, kind in enumerate(kinds):
        found = [oscillation(curve(row, "KID")) for row in of_kind(rows, kind).values()]
        axes.plot([place] * len(found), found, "o", color="0.5")
        axes.plot([place - 0.3, place + 0.3], [statistics.mean(found)] * 2, "k")
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8)
    axes.set(ylabel="oscillation: deviation of KID, last half")
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _negative(axes: Any, rows: Rows) -> None:
    for kind in kinds_of(rows):
        tests = [row["scores"]["negative"] for row in of_kind(rows, kind).values() if row["scores"]["negative"]]
        for name, style in (("free", "o-"), ("subject", "s--")) if tests else ():
            found = [mean_interval([test[name] for test in each]).mean for each in zip(*tests, strict=True)]
            scales = [test["scale"] for test in tests[0]]
            axes.plot(scales, found, style, color="k" if kind == BASE else "C4", label=f"{kind}: {name}")
    axes.set(xlabel="scale of NASA when sampling", ylabel="share of pictures", ylim=(0, 1.03))
    axes.legend(fontsize=8)
