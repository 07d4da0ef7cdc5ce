"""What an adapter that acts at some noise levels only costs: seconds a call of the model, inside ComfyUI on a CPU.

    COMFYUI_PATH=… python benchmarks/windowed_adapter.py

A random FLUX is called without an adapter, with a LoRA on its blocks as patches of the weights, and with the same one
in a window, outside of it and inside. One JSON line of medians of interleaved calls, each relative to the plain one.
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

WINDOW_TOP, INSIDE, OUTSIDE = -2.0, 0.95, 0.3  # log_snr; sigmas


def build(options: argparse.Namespace) -> Any:
    """A ModelPatcher over a random FLUX."""
    import comfy.model_patcher
    from comfy import supported_models

    heads = options.hidden // 64
    config = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 128,
        "hidden_size": options.hidden, "mlp_ratio": 4.0, "num_heads": heads, "depth": options.blocks,
        "depth_single_blocks": options.blocks, "axes_dim": [16, 24, 24], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
    }  # fmt: skip
    kind = supported_models.Flux({**config, "dtype": torch.float32})
    kind.set_inference_dtype(torch.float32, None)
    model = kind.get_model({}, "", device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def lora_of(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """On every linear layer of every block."""
    tensors = {}
    for name, layer in model.model.diffusion_model.named_modules():
        if "blocks." in name and isinstance(layer, torch.nn.Linear):
            outputs, inputs = layer.weight.shape
            tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(rank, inputs) * 0.02
            tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(outputs, rank) * 0.02
    return tensors


def call(model: Any, sigma: float, options: argparse.Namespace) -> float:
    """Seconds of one call."""
    from stylewright.nodes.bridge.denoiser import transformer_options

    with torch.inference_mode():
        model.load(torch.device("cpu"), full_load=True)
        settings = {**transformer_options(model), "cond_or_uncond": [0]}
        x, context, y = torch.randn(1, 16, options.side, options.side), torch.randn(1, 64, 128), torch.randn(1, 64)
        since = time.perf_counter()
        model.model.apply_model(x, torch.tensor([sigma]), c_crossattn=context, y=y, transformer_options=settings)
        seconds = time.perf_counter() - since
        model.unpatch_model()
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, with_origin
    from stylewright.training.windows import Window

    model = build(options)
    lora = with_origin(lora_of(model, options.rank))
    patched, windowed = (
        apply_adapter(model, None, lora, Strengths(window=window), warn=sys.stderr.write).model
        for window in (None, Window(high=WINDOW_TOP))
    )
    cases = {
        "none": (model, INSIDE), "patched": (patched, INSIDE),
        "outside": (windowed, OUTSIDE), "inside": (windowed, INSIDE),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, (each, sigma) in cases.items():
            seconds[name].append(call(each, sigma, options))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    relative = {name: round(value / medians["patched"], 3) for name, value in medians.items()}
    return {"seconds": {name: round(value, 4) for name, value in medians.items()}, "relative to patched": relative}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=3, help="double blocks, and as many single ones")
    parser.add_argument("--side", type=int, default=64, help="of the latent")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
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
