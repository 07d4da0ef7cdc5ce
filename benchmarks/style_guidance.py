"""What guidance by four predictions costs: processor seconds a step, inside ComfyUI on a CPU.

    COMFYUI_PATH=… python benchmarks/style_guidance.py

A random FLUX with a LoRA on its blocks is sampled by ComfyUI's own guiders and by ours, whose rules need two or three
predictions. Beside them, what a guider would cost that calls two patched MODELs in turn: ComfyUI patches the weights
anew whenever it loads the other one. One JSON line of medians of interleaved runs, in processor seconds a step and in
passes: a step of BasicGuider with the LoRA is one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfyui import open_comfyui, why_absent
from package import load_package
from windowed_adapter import build, lora_of

STEPS = 4


def conditioning(seed: int) -> list:
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 64, 128, generator=draw), {"pooled_output": torch.randn(1, 64, generator=draw)}]]


def guiders(options: argparse.Namespace) -> dict[str, tuple[Any, int]]:
    """By name: a guider, and its predictions a step."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, with_origin
    from stylewright.nodes.bridge.guider import Windows, guider_of
    from stylewright.training.guidance import cfg, consistency, finestyle

    base = build(options)
    lora = with_origin(lora_of(base, options.rank))
    model = apply_adapter(base, None, lora, Strengths(), warn=sys.stderr.write).model
    positive, negative = conditioning(0), conditioning(1)
    alone = Guider_Basic(model)
    alone.set_conds(positive)
    both = comfy.samplers.CFGGuider(model)
    both.set_cfg(3.5)
    found: dict[str, tuple[Any, int]] = {"BasicGuider": (alone, 1), "CFGGuider": (both, 2)}
    rules = {
        "CFG": (cfg(3.5), 2),
        "FineStyle, lambda_2 = 0": (finestyle(0.5, 0.0), 2),
        "FineStyle": (finestyle(0.7, 2.5), 3),
        "DCO consistency": (consistency(7.5, 3.0), 3),
    }
    for name, (rule, passes) in rules.items():
        found[name] = guider_of(model, base, rule, Windows(), sys.stderr.write), passes
    for guider, _ in list(found.values())[1:]:
        guider.set_conds(positive, negative)
    return found | {"loading the other MODEL, twice a step": (switching(model, base), 0)}


def switching(model: Any, base: Any) -> Callable[[], None]:
    """A step's loading of two MODELs that share their weights."""
    import comfy.model_management

    def switch() -> None:
        for each in (model, base):
            comfy.model_management.load_models_gpu([each], force_full_load=True)

    return switch


def seconds_a_step(guider: Any, options: argparse.Namespace) -> float:
    import comfy.samplers

    shape = (1, 16, options.side, options.side)
    noise, sigmas = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.linspace(1, 0, STEPS + 1)
    since = time.process_time()
    with torch.inference_mode():
        if callable(getattr(guider, "sample", None)):
            guider.sample(
                noise, torch.zeros(shape), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
            )
        else:
            for _ in range(STEPS):
                guider()
    return (time.process_time() - since) / STEPS


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found = guiders(options)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.repeats):
        for name, (guider, _) in found.items():
            seconds[name].append(seconds_a_step(guider, options))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    one = medians["BasicGuider"]
    return {
        name: {"predictions": found[name][1], "seconds": round(value, 4), "passes": round(value / one, 3)}
        for name, value in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=3, help="double blocks, and as many single ones")
    parser.add_argument("--side", type=int, default=64, help="of the latent")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if reason := why_absent():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as base:
        open_comfyui(Path(base), "cpu")
        load_package()
        result = measure(options)
    shape = {name: getattr(options, name) for name in ("hidden", "blocks", "side", "rank")}
    sys.stdout.write(json.dumps({**shape, "threads": torch.get_num_threads(), **result}) + "\n")


if __name__ == "__main__":
    main()
