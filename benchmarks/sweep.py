"""Many runs, each a line of ``runs.jsonl``, so that a sweep continues where it stopped."""

import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from stylewright.training.metrics import mean_interval


def run(out: Path, arms: Sequence[Any], measure: Callable[..., Any], workers: int) -> None:
    """``measure(arm)`` for every arm, a frozen dataclass, that is not in ``runs.jsonl`` yet, in so many processes."""
    out.mkdir(parents=True, exist_ok=True)
    done = [row["arm"] for row in read(out)]
    missing = [arm for arm in arms if dataclasses.asdict(arm) not in done]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(measure, arm): arm for arm in missing}
        for number, future in enumerate(as_completed(running), start=1):
            row = {"arm": dataclasses.asdict(running[future]), "scores": future.result()}
            with (out / "runs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{number} of {len(missing)}: {running[future]}", file=sys.stderr)


def read(out: Path) -> list[dict[str, Any]]:
    path = out / "runs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def shown(values: Sequence[float]) -> str:
    """Mean and half its 95 % interval; "-" for fewer than two."""
    if len(values) < 2:
        return "-"
    mean = mean_interval(values)
    return f"{mean.mean:.3f} +-{mean.high - mean.mean:.3f}"
