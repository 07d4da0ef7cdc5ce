"""Which law of the noise level learns a style best? The paper's Fig. 6 on the embedded model.

One-picture LoRAs on held-out styles under N(mu, 2^2) for several mu, under SD3's law, and under SD3's law again with
other draws (``sd3 replicate``: the noise of the experiment). Each is looked at after several numbers of steps, so
that style can be held against subject along the way and not at one point only.

    python benchmarks/mu_sweep.py --out sweep            runs what is missing, then prints the tables
    python benchmarks/mu_sweep.py --out sweep --report   prints the tables of what is there
    … --figure mu_sweep.png                              and draws them

Every finished run is a line of ``runs.jsonl``, so that the sweep continues where it stopped; the runs that
the README quotes are in ``results/mu_sweep.jsonl``. mu is in log_snr at the 64 tokens of the embedded model;
the paper's -6 at 4096 tokens is carried to -1.84 by the resolution rule. ``sd3`` is SD3's N(-2.2, 2^2)
carried likewise, to N(1.96, 2^2); taken as it is written it would be the row ``mu -2`` but for 0.2, and the
unshifted logit-normal is the row ``mu 0``.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from package import load_package

load_package()

import torch  # noqa: E402
from sweep import read, run, shown  # noqa: E402

from stylewright.training.adapters.methods import AdapterConfig  # noqa: E402
from stylewright.training.data.encoding import encode  # noqa: E402
from stylewright.training.data.items import items_from_memory  # noqa: E402
from stylewright.training.demo.scoring import oracle_judge, other_subjects  # noqa: E402
from stylewright.training.density_presets import DensityConfig  # noqa: E402
from stylewright.training.embedded.oracle import Oracle, load_oracle  # noqa: E402
from stylewright.training.embedded.renderer import HELD_OUT_STYLES, SUBJECTS, render, scene_of  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.generate import generate  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.loops.config import TrainConfig  # noqa: E402
from stylewright.training.loops.train import train  # noqa: E402
from stylewright.training.metrics import Interval, mean_interval  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

FREE_WORD = "<v0>"
LAWS = {f"mu {mu:g}": DensityConfig("style-friendly", mu=mu, sigma=2.0) for mu in (0, -1, -2, -3, -4, -6, -8)}
SD3 = DensityConfig("sd3", reference_tokens=4096)  # carried to 64 tokens, as the paper's law would be: N(1.96, 2^2)
LAWS |= {"sd3": SD3, "sd3 replicate": SD3}
FIRST = next(iter(LAWS))
STEPS = (20, 40, 60, 80)
RECIPE = TrainConfig(
    steps=max(STEPS),
    batch_size=4,
    accumulation=1,
    learning_rate=2e-3,
    style_phrase=FREE_WORD,
    adapter=AdapterConfig(rank=8),
    save_every=0,
    sample_every=20,
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run."""

    style: str
    seed: int
    law: str


def arms(styles: int, seeds: int) -> Iterator[Arm]:
    for seed, style, law in itertools.product(range(seeds), list(HELD_OUT_STYLES)[:styles], LAWS):
        yield Arm(style, seed, law)


@functools.cache
def model() -> tuple[Host, Oracle]:
    """What draws and what judges, loaded once a process. One thread: the work is shared out by runs."""
    torch.set_num_threads(1)
    return load_embedded(), load_oracle(Weights().oracle)


def measure(arm: Arm) -> dict[str, dict[str, float]]:
    """Style and subject score after each number of steps."""
    host, oracle = model()
    shown = arm.seed % len(SUBJECTS)
    subjects = other_subjects(shown)
    style = HELD_OUT_STYLES[arm.style]
    scene = scene_of(torch.tensor([shown]), style, generator(arm.seed, "reference", arm.style))
    items = items_from_memory([render(scene)[0]], SUBJECTS[shown])
    dataset = encode(items, host, resolution=host.resolution, style_phrase=FREE_WORD)
    judge, scores = oracle_judge(oracle, style), {}
    prompts = [f"{SUBJECTS[i]} in {FREE_WORD} style" for i in subjects]

    def look(step: int) -> torch.Tensor:
        pictures = generate(host, prompts, seed=arm.seed, steps=16, guidance_scale=3.0)
        scores[str(step)] = dataclasses.asdict(judge(pictures, subjects))
        return pictures

    if arm.law == FIRST:  # the same under every law
        look(0)
    # The replicate differs from its twin in nothing but what is drawn.
    seed = arm.seed + 1000 * (arm.law == "sd3 replicate")
    config = dataclasses.replace(RECIPE, seed=seed, density=LAWS[arm.law])
    train(host.denoiser, dataset, config, run_dir=None, sample=look)
    return scores


def report(out: Path) -> str:
    """Means with 95 % intervals over the arms, by law and number of steps, and the difference to SD3's law."""
    rows = read(out)
    lines = [f"{len(rows)} runs; mean and half the 95 % interval over styles and seeds", ""]
    before = (shown(list(scores(rows, FIRST, 0, name).values())) for name in ("style", "subject"))
    lines += [f"{'before':15} " + " ".join(f"{cell:>14}" for cell in before), ""]
    for step in STEPS:
        lines += [f"after {step} steps", f"{'law':15} {'style':>14} {'subject':>14} {'style - sd3':>16}"]
        for law in LAWS:
            mine, base = scores(rows, law, step, "style"), scores(rows, "sd3", step, "style")
            paired = [mine[place] - base[place] for place in mine.keys() & base.keys()]
            cells = (mine.values(), scores(rows, law, step, "subject").values(), paired)
            lines.append(f"{law:15} " + " ".join(f"{shown(list(cell)):>14}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


def scores(rows: list[dict[str, Any]], law: str, step: int, name: str) -> dict[tuple[str, int], float]:
    """One score after so many steps under a law, by style and seed."""
    mine = [row for row in rows if row["arm"]["law"] == law]
    return {(row["arm"]["style"], row["arm"]["seed"]): row["scores"][str(step)][name] for row in mine}


def interval(rows: list[dict[str, Any]], law: str, step: int, name: str) -> Interval:
    return mean_interval(list(scores(rows, law, step, name).values()))


def draw(out: Path, path: Path) -> None:
    """Style score against mu after each number of steps, and the way of each law through style and subject."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = read(out)
    means = {name: law.mu for name, law in LAWS.items() if law.mu is not None}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, step in enumerate(STEPS):
        colour = colormaps["viridis"](0.85 * number / (len(STEPS) - 1))
        found = [interval(rows, name, step, "style") for name in means]
        errors = [[i.mean - i.low for i in found], [i.high - i.mean for i in found]]
        left.errorbar(list(means.values()), [i.mean for i in found], errors, color=colour, label=f"{step} steps")
        left.axhline(interval(rows, "sd3", step, "style").mean, color=colour, linestyle=":")
    left.set(xlabel="mu of N(mu, 2²), log-SNR at 64 tokens", ylabel="style score (dotted: SD3's law)")
    left.legend(fontsize=8, ncols=2, loc="lower left")
    for number, name in enumerate(LAWS):
        ways = [[interval(rows, name, step, score).mean for step in STEPS] for score in ("subject", "style")]
        grey = name.startswith("sd3")
        colour = "0.4" if grey else colormaps["plasma"](0.9 * number / len(means))
        right.plot(*ways, marker="o", markersize=4, color=colour, label=name, linestyle="--" if grey else "-")
    right.set(xlabel="subject score", ylabel="style score", title=f"after {', '.join(map(str, STEPS))} steps")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--styles", type=int, default=len(HELD_OUT_STYLES), help="how many held-out styles")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--figure", type=Path, help="draw it, too")
    options = parser.parse_args()
    if not options.report:
        run(options.out, list(arms(options.styles, options.seeds)), measure, options.workers)
    print(report(options.out))
    if options.figure:
        draw(options.out, options.figure)


if __name__ == "__main__":
    main()
