"""A training step at real size on a GPU, inside ComfyUI: FLUX.1-dev-sized and SDXL-sized random weights, in bfloat16.

The weights are made on the device, through ComfyUI's classes; our loop trains the preset "style" on them as the trainer
node does, batch 1. ``kept`` recomputes nothing, ``recomputed`` every block. ``seconds`` is the least of an optimizer
step, ``model`` and ``peak`` what torch has allocated for tensors before and at most in training, ``share`` the counted
products a second over those of the fastest product of two square bfloat16 matrices found here; what is computed twice
is counted twice.

    COMFYUI_PATH=… python benchmarks/real_size.py
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from comfyui import open_comfyui, why_absent
from comfyui_models import COMFY_KINDS, comfyui_model
from contenders import Encoder
from models import KINDS
from package import load_package
from training_step import after_each_step, now

GIB = 2**30
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Row:
    kind: str
    pixels: int  # a side
    blocks: str  # "kept" or "recomputed"
    model: int  # bytes
    peak: int | None  # bytes, the model's included; None = memory ran out
    seconds: float | None  # of an optimizer step
    tflop: float | None  # of an optimizer step
    share: float | None  # of the ceiling


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("real_size.py: there is no CUDA device here, so nothing is measured")
    if reason := why_absent():
        raise SystemExit(f"real_size.py needs ComfyUI: {reason}")
    logging.disable(logging.WARNING)
    open_comfyui(Path(tempfile.mkdtemp(prefix="stylewright-benchmark-")), "cuda")
    load_package()
    ceiling = max(products_a_second("cuda", size) for size in (4096, 8192))
    print(f"{torch.cuda.get_device_name()}: {ceiling / 1e12:.0f} TFLOP/s in bfloat16 products", file=sys.stderr)
    rows = []
    for kind in options.kinds:
        for row in rows_of(kind, options.pixels, options.steps, ceiling, "cuda"):
            print(line(row), file=sys.stderr)
            rows.append(row)
        torch.cuda.empty_cache()
    if options.json:
        report = {"device": torch.cuda.get_device_name(), "ceiling": ceiling, "rows": [asdict(row) for row in rows]}
        print(json.dumps(report, indent=2))
    else:
        show(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(COMFY_KINDS), default=["sdxl-base", "flux-dev"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[512, 1024], help="sides of the pictures")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run; the first is not counted")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps is at least 2")
    return options


def products_a_second(device: str, size: int, seconds: float = 0.5) -> float:
    """FLOP a second of the product of two square matrices in bfloat16: the best of several turns."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    turn, best, until = 10, float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        since = now(device)
        for _ in range(turn):
            a @ b
        best = min(best, (now(device) - since) / turn)
    return 2 * size**3 / best


def rows_of(kind: str, pixels: list[int], steps: int, ceiling: float, device: str) -> list[Row]:
    model = comfyui_model(kind, dtype=torch.bfloat16, device=device)
    size = sum(tensor.nbytes for tensor in model.model.state_dict().values())
    rows = []
    for side in pixels:
        for blocks in ("kept", "recomputed"):
            train = training(model, kind, side, blocks == "recomputed", device)
            rows.append(measured(train, steps, ceiling, device, Row(kind, side, blocks, size, None, None, None, None)))
    return rows


def training(model: Any, kind: str, pixels: int, recompute: bool, device: str) -> Callable[[int], object]:
    """Steps -> our loop on ComfyUI's model, through the bridge that the trainer node uses."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.data.dataset import Dataset, Example
    from stylewright.training.loops.config import TrainConfig
    from stylewright.training.loops.train import train

    about, source, side = KINDS[kind], torch.Generator().manual_seed(0), pixels // PIXELS_PER_LATENT
    latent = torch.randn(about.channels, side, side, generator=source)
    context, pooled = (torch.randn(1, *shape, generator=source) for shape in (about.context, (about.pooled,)))
    prompts = PromptTable(Encoder(context, pooled))

    def run(steps: int) -> object:
        config = TrainConfig(
            steps=steps,
            accumulation=1,
            optimizer="adamw",
            precision="bfloat16",
            gradient_checkpointing=recompute,
            adapter=AdapterConfig(rank=16, alpha=16),
        )
        with torch.inference_mode(), training_session(model):
            row = prompts.encode(["0"])
            data = Dataset([Example("0", latent, row, None, "a picture")], row)
            denoiser = ComfyDenoiser(model, prompts)
            return train(denoiser, data, config, run_dir=None, report=lambda event: None, device=device)

    return run


def measured(train: Callable[[int], object], steps: int, ceiling: float, device: str, row: Row) -> Row:
    """The row filled in. Times and memory are of a run in which nothing is counted, the products of another one."""
    from stylewright.training.memory import Footprint, is_out_of_memory

    ends: list[float] = []
    try:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with after_each_step(lambda optimizer: ends.append(now(device))):
            train(steps)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        counted: list[int] = []
        with Footprint() as cost, after_each_step(lambda optimizer: counted.append(cost.flops)):
            train(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return row
    seconds = min(after - before for before, after in zip(ends, ends[1:], strict=False))
    flop = counted[1] - counted[0]
    found = {"peak": peak, "seconds": seconds, "tflop": flop / 1e12, "share": flop / seconds / ceiling}
    return Row(**{**asdict(row), **found})


HEADS = ("model", "pixels", "blocks", "model GB", "peak GB", "s a step", "TFLOP", "share of ceiling")


def show(rows: list[Row]) -> None:
    print("| " + " | ".join(HEADS) + " |")
    print("| --- " * len(HEADS) + "|")
    for row in rows:
        print(line(row))


def line(row: Row) -> str:
    begin = f"| {row.kind} | {row.pixels} | {row.blocks} | {row.model / GIB:.2f} |"
    if row.seconds is None or row.tflop is None or row.share is None:
        return f"{begin} memory ran out | | | |"
    peak = "not counted" if row.peak is None else f"{row.peak / GIB:.2f}"
    return f"{begin} {peak} | {row.seconds:.3f} | {row.tflop:.2f} | {row.share:.2f} |"


if __name__ == "__main__":
    main()
