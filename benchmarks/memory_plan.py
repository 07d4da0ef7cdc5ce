"""Plans against what is then measured: memory and time of small FLUX, SD3 and SDXL, several sizes and settings.

Every row is one run. ``plan`` is what the small passes foretell before training; ``taken`` is the most bytes of tensors
that three steps of training then have at once beyond the model (on CUDA, what the allocator counts). ``kept``, ``half``
and ``all`` are how many blocks are recomputed: none, as many as half of the room demands, every one. Times are of a
step: ``rehearsed`` before training, ``trained`` in it, without the first step; on the CPU, of this process at work.

With ``--kinds flux-dev sdxl-base --device cuda --latents 64 128`` the models have their real size, in bfloat16.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from models import KINDS, Kind, conditioning_of, denoiser_of
from package import load_package

MEGABYTE = 2**20
STEPS = 3


@dataclass(frozen=True)
class Row:
    kind: str
    latents: int  # a side
    batch: int
    setting: str
    recomputed: int  # blocks
    planned: int  # bytes
    taken: int
    rehearsed: float  # seconds of a step
    trained: float
    flops: float  # foretold of a step, over those counted


def main() -> None:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("memory_plan.py: there is no CUDA device here")
    torch.set_num_threads(1)
    load_package()
    rows = []
    for name in options.kinds:
        for row in rows_of(name, KINDS[name], options):
            rows.append(row)
            print(line(row), file=sys.stderr)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["flux", "sd3", "sdxl"])
    parser.add_argument("--latents", nargs="+", type=int, default=[48, 64], help="sides of the pictures' latents")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    return parser.parse_args()


def rows_of(name: str, kind: Kind, options: argparse.Namespace) -> Iterator[Row]:
    from stylewright.training.data.dataset import Dataset, Example
    from stylewright.training.loops import survey
    from stylewright.training.loops.plan import Budget, choose
    from stylewright.training.loops.planner import Planner

    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    denoiser, rows = denoiser_of(kind, options.device, dtype), conditioning_of(kind)
    survey.now = clock
    for side in options.latents:
        for batch in options.batches:
            latent = torch.randn(kind.channels, side, side, generator=torch.Generator().manual_seed(1))
            data = Dataset([Example("0", latent, rows, None, "a picture")], rows)
            config = configured(batch, options.device)
            planner = Planner(denoiser, data, config, device=options.device)
            first, found = planner.survey(Budget(0, None))
            every = replace(config, memory="as set")
            least = choose(found, every, Budget(0, None))
            room = Budget(0, None)
            half = Budget(0, 1.1 * (first.beyond_the_model + least.beyond_the_model) / 2)
            settings = {"kept": (first, room), "half": (choose(found, config, half), half), "all": (least, room)}
            for setting, (plan, budget) in settings.items():
                rehearsed = planner.rehearse(plan, found, budget)
                measured = trained(denoiser, data, config, rehearsed.saving, options.device)
                flops = found.flops(batch, side * side, rehearsed.saving) * config.accumulation
                yield Row(
                    name, side, batch, setting, recomputed_of(rehearsed), plan.beyond_the_model, measured["bytes"],
                    rehearsed.step_seconds or 0.0, measured["seconds"], flops / measured["flops"],
                )  # fmt: skip


def configured(batch: int, device: str) -> Any:
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.loops.config import TrainConfig

    return TrainConfig(
        steps=40,  # a plan times no shorter run
        batch_size=batch,
        accumulation=1,
        precision="bfloat16" if device == "cuda" else "float32",
        gradient_checkpointing=True,
        adapter=AdapterConfig(rank=8),
    )


def recomputed_of(plan: Any) -> int:
    from stylewright.training.loops.saving import ALL

    return plan.blocks if ALL in plan.saving.recomputed else len(plan.saving.recomputed)


def trained(denoiser: Any, data: Any, config: Any, saving: Any, device: str) -> dict[str, float]:
    """Bytes, FLOPs of a step and seconds of a step, of a short run each."""
    from stylewright.training.loops.train import train
    from stylewright.training.memory import Footprint

    def run(steps: int, report: Any = None) -> None:
        short = replace(config, steps=steps, report_every=1)
        train(denoiser, data, short, run_dir=None, report=report, device=device, saving=saving)

    ends: list[float] = []
    run(STEPS, lambda event: ends.append(clock(torch.device(device))))
    seconds = min(after - before for before, after in zip(ends, ends[1:], strict=False))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(2)
        taken = torch.cuda.max_memory_allocated() - before
    with Footprint(torch.device(device)) as cost:
        run(2)
    return {
        "bytes": taken if device == "cuda" else cost.peak,
        "flops": cost.flops / 2,
        "seconds": seconds,
    }


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def line(row: Row) -> str:
    return (
        f"| {row.kind} | {row.latents} | {row.batch} | {row.setting}, {row.recomputed} | "
        f"{row.planned / MEGABYTE:.1f} | {row.taken / MEGABYTE:.1f} | {row.planned / row.taken:.3f} | "
        f"{row.rehearsed:.2f} | {row.trained:.2f} | {row.rehearsed / row.trained:.2f} | {row.flops:.3f} |"
    )


def show(rows: list[Row]) -> None:
    print("| model | latents | batch | recomputed | plan MB | taken MB | ratio | rehearsed | trained | ratio | FLOPs |")
    print("| --- " * 11 + "|")
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
