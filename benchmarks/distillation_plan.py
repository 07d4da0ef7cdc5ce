"""What an update of PG-SB's size takes of each GPU: bytes and products, counted on a model without numbers.

A UNet of SD2.1's size on torch's meta device: every operation is there with its shapes, and nothing is computed. An
update is a pass with gradients through the student and one through the fake, and four more forward passes: teacher and
fake, each with the prompt and without. Not counted is what a block holds while it is computed or computed again.
A student is an adapter, or as in the paper all weights of a second network, in float32 under autocast.

    python benchmarks/distillation_plan.py
"""

# ruff: noqa: E402 (the package comes from the folder above, wherever it is)

import argparse
import json

import torch
from package import load_package
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

load_package()

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.gradients import differentiable

UNET = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024, "use_linear_projection": True,
}  # fmt: skip
BYTES = 4 + 4 + 8  # of each number of an adapter: weight, gradient, Adam's averages
AVERAGE = 4  # of the student's


def counted(unet: nn.Module, *, gradients: bool) -> tuple[float, float]:
    """TFLOP of the passes of one sample of 512 x 512 pixels, and GB that it keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    shapes = ((1, 4, 64, 64), (1, 77, UNET["cross_attention_dim"]))
    x, context = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes)
    products = FlopCounterMode(display=False)
    with products, saved_tensors_hooks(keep, lambda tensor: tensor), torch.set_grad_enabled(gradients):
        answer = unet(x, torch.full((1,), 999, device="meta"), context, return_dict=False)[0]
        weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
        size = sum(count for storage, count in kept.items() if storage not in weights)
        if gradients:
            answer.float().square().mean().backward()
    return products.get_total_flops() / 1e12, size / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="on each GPU")
    parser.add_argument("--rank", type=int, default=64, help="of either adapter")
    options = parser.parse_args()
    from diffusers import UNet2DConditionModel

    torch.is_autocast_enabled = lambda *_: False  # which knows no meta device
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    teacher, _ = counted(unet, gradients=False)
    size = sum(parameter.nbytes for parameter in unet.parameters())
    config = AdapterConfig(rank=options.rank, targets="all")
    with attached(unet, config, family="sd15", seed=0, device=torch.device("meta")) as adapter:
        numbers = sum(parameter.numel() for parameter in adapter.parameters())
        fake, _ = counted(unet, gradients=False)
        adapters = numbers * BYTES / 1e9
        found = {
            "model GB": size / 1e9,
            "numbers of an adapter, millions": numbers / 1e6,
            "both adapters with optimizers and average GB": 2 * adapters + numbers * AVERAGE / 1e9,
        }
        learning = {}
        for name, again in (("kept", False), ("recomputed", True)):
            with differentiable(unet, checkpoint=again):
                products, kept = counted(unet, gradients=True)
            learning[name] = products
            found[f"activations {name}, GB"] = options.samples * kept
            found[f"TFLOP an update, activations {name}"] = options.samples * (2 * products + 2 * teacher + 2 * fake)
    numbers = sum(parameter.numel() for parameter in unet.requires_grad_(True).parameters())
    found["numbers of the model, millions"] = numbers / 1e6
    found["full student with optimizer, average and what autocast casts, GB"] = numbers * (BYTES + AVERAGE + 2) / 1e9
    found["its fake adapter with optimizer, GB"] = adapters
    for name, again in (("kept", False), ("recomputed", True)):
        with differentiable(unet, checkpoint=again):
            products, kept = counted(unet, gradients=True)
        found[f"full, activations {name}, GB"] = options.samples * kept
        found[f"full, TFLOP an update, activations {name}"] = options.samples * (
            products + learning[name] + 2 * teacher + 2 * fake
        )
    print(json.dumps({name: round(value, 2) for name, value in found.items()}, indent=2))


if __name__ == "__main__":
    main()
