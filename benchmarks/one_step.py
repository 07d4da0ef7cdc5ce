"""The One-Step Sampler against ComfyUI's own: what each feeds the network, what comes of it, and what it costs.

    COMFYUI_PATH=… python benchmarks/one_step.py [--json]

``fed`` is the deviation of the network's input beside that of the noise: 1 for a generator. ``off`` is the relative
difference to x0 in float64, from the network's answer to unit noise at that time, on small random models: for the size
of the error on a real model it is only a hint. ``over`` is what the sampler takes beyond the model's call inside it,
by wall clock, in parts of the call: medians of interleaved runs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from comfyui import open_comfyui, why_absent
from package import load_package
from torch import Tensor

TIMES = (999, 800, 625, 399, 199)
SMALL, LARGE = 16, 64  # side of a latent: for what comes of it, and for what it costs


class Timed:
    """A sampler that notes how long it takes, and how much of that is the model's call."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.shares: list[tuple[float, float]] = []  # seconds beyond the call, and in it

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, *rest: Any) -> Tensor:
        model, called = model_wrap.inner_model, []
        call = model.apply_model

        def timed(*args: Any, **kwargs: Any) -> Tensor:
            since = time.perf_counter()
            answer = call(*args, **kwargs)
            called.append(time.perf_counter() - since)
            return answer

        model.apply_model = timed
        try:
            since = time.perf_counter()
            drawn = self.sampler.sample(model_wrap, sigmas, dict(extra_args), callback, *rest)
            took = time.perf_counter() - since
        finally:
            del model.apply_model
        self.shares.append((took - sum(called), sum(called)))
        return drawn


def draw(model: Any, conditioning: list, sampler: Any, sigmas: Tensor, side: int) -> Tensor:
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    noise = noise_of(model, side)
    with torch.inference_mode():
        drawn = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)
        return model.model.process_latent_in(drawn)


def noise_of(model: Any, side: int) -> Tensor:
    shape = (1, model.model.latent_format.latent_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def deviations(model: Any, conditioning: list) -> list[dict[str, Any]]:
    """At each time: what both samplers feed, and how far both are from float64."""
    import comfy.samplers

    from stylewright.nodes.bridge.one_step import OneStep

    sampling, rows = model.get_model_object("model_sampling"), []
    for moment in TIMES:
        sigma = sampling.sigma(torch.tensor([float(moment)]))
        sigmas, row, reference = torch.cat([sigma, torch.zeros(1)]), {"time": moment}, None
        for name, sampler in (("ours", OneStep()), ("stock", comfy.samplers.sampler_object("euler"))):
            seen: list[tuple[Tensor, Tensor]] = []
            handle = model.model.diffusion_model.register_forward_hook(
                lambda module, args, answer, seen=seen: seen.append((args[0].double(), answer.double()))
            )
            drawn = draw(model, conditioning, sampler, sigmas, SMALL)
            handle.remove()
            ((fed, answer),) = seen
            alpha = (1 + sigma.double().square()).rsqrt()
            if reference is None:  # ours comes first: its input is unit noise
                reference = (fed - (1 - alpha**2).sqrt() * answer[:, : fed.shape[1]]) / alpha
            row |= {
                f"fed by {name}": round(float(fed.std() / noise_of(model, SMALL).std()), 3),
                f"{name} off": float(f"{float((drawn - reference).norm() / reference.norm()):.2g}"),
            }
        rows.append(row)
    return rows


def cost(model: Any, conditioning: list, repeats: int) -> dict[str, Any]:
    """What the samplers take beyond the model's call."""
    import comfy.samplers

    from stylewright.nodes.bridge.one_step import OneStep

    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.sigma_max), 0.0])
    timed = {"ours": Timed(OneStep()), "stock": Timed(comfy.samplers.sampler_object("euler"))}
    for _ in range(repeats):
        for sampler in timed.values():
            draw(model, conditioning, sampler, sigmas, LARGE)
    result = {}
    for name, sampler in timed.items():
        beyond, inside = (statistics.median(values) for values in zip(*sampler.shares, strict=True))
        result[name] = {
            "call ms": round(1000 * inside, 1), "beyond ms": round(1000 * beyond, 2), "over": round(beyond / inside, 4),
        }  # fmt: skip
    return result


def conditioning_of(width: int, pooled: int) -> list:
    """ComfyUI's, of one random prompt."""
    draw = torch.Generator().manual_seed(0)
    return [[torch.randn(1, 77, width, generator=draw), {"pooled_output": torch.randn(1, pooled, generator=draw)}]]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([f"{value:g}" for value in row.values()] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="of what is timed")
    parser.add_argument("--json", action="store_true", help="one object instead of tables")
    options = parser.parse_args()
    if reason := why_absent():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as base:
        open_comfyui(Path(base), "cpu")
        load_package()
        from comfyui_models import comfyui_model

        conditioning = conditioning_of(256, 128)
        models = {name: comfyui_model(name) for name in ("sdxl", "flux")}
        rows = deviations(models["sdxl"], conditioning)
        costs = {name: cost(model, conditioning, options.repeats) for name, model in models.items()}
    if options.json:
        result = {"threads": torch.get_num_threads(), "deviations": rows, "cost": costs}
        sys.stdout.write(json.dumps(result) + "\n")
        return
    sys.stdout.write(table(rows))
    for name, each in costs.items():
        for sampler, figures in each.items():
            sys.stdout.write(f"{name}, {sampler}: {figures}\n")


if __name__ == "__main__":
    main()
