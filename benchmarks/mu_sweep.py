"""Which law of the noise level learns a style best? The paper's Fig. 6 on the embedded model.

One-picture LoRAs on held-out styles under N(mu, 2^2) for several mu, under SD3's law, and under SD3's law again with
other draws (``sd3 replicate``: the noise of the experiment). Each is looked at after several numbers of steps, so
that style can be held against subject along the way and not at one point only.

    python benchmarks/mu_sweep.py --out sweep            runs what is missing, then prints the tables
    python benchmarks/mu_sweep.py --out sweep --report   prints the tables of what is there

Every finished run is a line of ``runs.jsonl``, so that the sweep continues where it stopped. mu is in log_snr at the
64 tokens of the embedded model; the paper's -6 at 4096 tokens is carried to -1.84 by the resolution rule.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from package import load_package

load_package()

import torch  # noqa: E402

from stylewright.training.adapters.methods import AdapterConfig  # noqa: E402
from stylewright.training.data.encoding import encode  # noqa: E402
from stylewright.training.data.items import items_from_memory  # noqa: E402
from stylewright.training.demo.scoring import oracle_judge, other_subjects  # noqa: E402
from stylewright.training.densities import DensityConfig  # noqa: E402
from stylewright.training.embedded.oracle import load_oracle  # noqa: E402
from stylewright.training.embedded.renderer import HELD_OUT_STYLES, SUBJECTS, render, scene_of  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.generate import generate  # noqa: E402
from stylewright.training.loops.config import TrainConfig  # noqa: E402
from stylewright.training.loops.train import train  # noqa: E402
from stylewright.training.metrics import mean_interval  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

FREE_WORD = "<v0>"
LAWS = {f"mu {mu:g}": DensityConfig("style-friendly", mu=mu, sigma=2.0) for mu in (0, -1, -2, -3, -4, -6, -8)}
SD3 = DensityConfig("sd3", reference_tokens=4096)  # carried to 64 tokens, as the paper's law would be: N(1.96, 2^2)
LAWS |= {"sd3": SD3, "sd3 replicate": SD3}
STEPS = (20, 40, 80)
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


def measure(arm: Arm, host: Any, oracle: Any) -> dict[str, dict[str, float]]:
    """Style and subject score after each number of steps."""
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
        if step in STEPS:
            scores[str(step)] = dataclasses.asdict(judge(pictures, subjects))
        return pictures

    # The replicate differs from its twin in nothing but what is drawn.
    seed = arm.seed + 1000 * (arm.law == "sd3 replicate")
    config = dataclasses.replace(RECIPE, seed=seed, density=LAWS[arm.law])
    train(host.denoiser, dataset, config, run_dir=None, sample=look)
    return scores


def run(out: Path, styles: int, seeds: int) -> None:
    """Runs every arm that is not in ``runs.jsonl`` yet."""
    done = {Arm(**row["arm"]) for row in read(out)}
    host, oracle = load_embedded(), load_oracle(Weights().oracle)
    wanted = list(arms(styles, seeds))
    out.mkdir(parents=True, exist_ok=True)
    for number, arm in enumerate(wanted, start=1):
        if arm not in done:
            row = {"arm": dataclasses.asdict(arm), "scores": measure(arm, host, oracle)}
            with (out / "runs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{number} of {len(wanted)}: {arm}", file=sys.stderr)


def read(out: Path) -> list[dict[str, Any]]:
    path = out / "runs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def report(out: Path) -> str:
    """Means with 95 % intervals over the arms, by law and number of steps, and the difference to SD3's law."""
    rows = read(out)
    lines = [f"{len(rows)} runs; mean and half the 95 % interval", ""]
    for step in map(str, STEPS):
        lines += [f"after {step} steps", f"{'law':15} {'style':>14} {'subject':>14} {'style - sd3':>16}"]
        for law in LAWS:
            mine = {key(row): row["scores"][step] for row in rows if row["arm"]["law"] == law}
            base = {key(row): row["scores"][step] for row in rows if row["arm"]["law"] == "sd3"}
            paired = [mine[k]["style"] - base[k]["style"] for k in mine.keys() & base.keys()]
            cells = [[score[name] for score in mine.values()] for name in ("style", "subject")]
            lines.append(f"{law:15} " + " ".join(f"{shown(cell):>14}" for cell in (*cells, paired)))
        lines.append("")
    return "\n".join(lines)


def key(row: dict[str, Any]) -> tuple[str, int]:
    return row["arm"]["style"], row["arm"]["seed"]


def shown(values: list[float]) -> str:
    if len(values) < 2:
        return "-"
    interval = mean_interval(values)
    return f"{interval.mean:.3f} +-{interval.high - interval.mean:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--styles", type=int, default=len(HELD_OUT_STYLES), help="how many held-out styles")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    if not options.report:
        run(options.out, options.styles, options.seeds)
    print(report(options.out))


if __name__ == "__main__":
    main()
