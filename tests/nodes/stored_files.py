"""A small FLUX in files of every kind that users have, for the loader nodes of ComfyUI and of ComfyUI-GGUF."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from stored_models import FLOAT8, QUANTISED, quantised_state
from tiny_models import tiny_model
from torch import Tensor

# What ComfyUI assumes of a FLUX rather than finds in its file.
SIZES = {"hidden_size": 128, "num_heads": 1, "axes_dim": [16, 56, 56], "depth": 1, "depth_single_blocks": 1}

State = dict[str, Tensor]
File = tuple[State, dict[str, str]]  # tensors and header


@dataclass(frozen=True)
class Kind:
    """A kind of file, and how it is opened."""

    write: Callable[[], File]
    weights: str  # that a layer's weight is made of in memory
    weight_dtype: str = "default"  # UNETLoader's
    flag: str = ""  # of ComfyUI's command line
    widgets: dict[str, object] = field(default_factory=dict)  # of the trainer
    fast: bool = False  # multiply in the weights' own type, as ComfyUI would on a GPU that can
    rounding: float = 0.0  # what a patched weight is off by when it is put back into its form
    missing: Callable[[], str] = lambda: ""  # why this cannot be tried here
    ending: str = "safetensors"


def dense():
    return tiny_model("flux", **SIZES)


def state() -> State:
    return dict(dense().model.diffusion_model.state_dict())


def is_block(key: str, tensor: Tensor) -> bool:
    return "blocks" in key and key.endswith(".weight") and tensor.ndim == 2


def cast(dtype: torch.dtype) -> Callable[[], File]:
    """Every tensor, biases and scales of norms as well, as the files of whole models in float8 are."""
    return lambda: ({key: tensor.to(dtype) for key, tensor in state().items()}, {})


def quantised(form: str) -> Callable[[], File]:
    return lambda: (quantised_state(dense(), *QUANTISED[form], fast=True), {})


def said_in_the_header(form: str) -> Callable[[], File]:
    """Of which layers are quantised, and how."""

    def write() -> File:
        tensors, _ = quantised(form)()
        marks = {key.removesuffix(".comfy_quant"): tensors.pop(key) for key in list(tensors) if "comfy_quant" in key}
        layers = {layer: json.loads(mark.numpy().tobytes()) for layer, mark in marks.items()}
        return tensors, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}

    return write


def old_scaled_float8(marker: int, scale_input: float | None) -> Callable[[], File]:
    """Before ComfyUI had quantised tensors: a ``scaled_fp8`` of two elements asks for products in full precision."""

    def write() -> File:
        tensors = {"scaled_fp8": torch.zeros(marker, dtype=FLOAT8)}
        for key, tensor in state().items():
            if is_block(key, tensor):
                layer, scale = key.removesuffix(".weight"), tensor.abs().max() / torch.finfo(FLOAT8).max
                tensors |= {key: (tensor / scale).to(FLOAT8), f"{layer}.scale_weight": scale}
                if scale_input is not None:
                    tensors[f"{layer}.scale_input"] = torch.tensor(scale_input)
            else:
                tensors[key] = tensor.bfloat16()
        return tensors, {}

    return write


def smoothed_nvfp4() -> File:
    """AWQ, as NVIDIA's ModelOpt writes it: the inputs are multiplied by a scale that their weights are divided by."""
    model, scales, draw = dense(), {}, torch.Generator().manual_seed(8)
    for key, tensor in model.model.diffusion_model.state_dict().items():
        if is_block(key, tensor):
            scale = torch.rand(tensor.shape[1], generator=draw) * 1.5 + 0.5
            tensor.div_(scale)
            scales[f"{key.removesuffix('weight')}pre_quant_scale"] = scale
    return quantised_state(model, *QUANTISED["nvfp4"], fast=True) | scales, {}


def mixed_gguf() -> File:
    """For :func:`save`, which packs it."""
    return state(), {}


def save(kind: Kind, folder: Path) -> None:
    """model.safetensors or model.gguf."""
    tensors, header = kind.write()
    if kind.ending == "gguf":
        write_gguf(folder / "model.gguf", tensors)
    else:
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", header)


def opened(kind: Kind):
    """MODEL, as a node before the trainer makes it, in a server's inference mode."""
    import nodes

    with torch.inference_mode():
        if kind.ending == "gguf":
            return gguf_nodes().UnetLoaderGGUF().load_unet("model.gguf")[0]
        (model,) = nodes.UNETLoader().load_unet("model.safetensors", kind.weight_dtype)
    for part in model.model.modules():
        if kind.fast and "_full_precision_mm" in vars(part):
            part._full_precision_mm = False
    return model


def form_of(weight: Tensor) -> str:
    """What a weight is made of, as in :attr:`Kind.weights`."""
    numbers = getattr(weight, "_qdata", weight)
    name = type(weight).__name__
    return f"{name} of {str(numbers.dtype)[6:]}".removeprefix("Parameter of ")


# GGUF

GGUF_KINDS = {
    "img_attn": "Q8_0",
    "txt_attn": "Q5_1",
    "img_mlp": "Q4_0",
    "txt_mlp": "BF16",
    "linear1": "Q8_0",
    "linear2": "F16",
}  # of layers; all others are in float32


def without_gguf() -> str:
    if "COMFYUI_GGUF_PATH" in os.environ and importlib.util.find_spec("gguf"):
        return ""
    return "no ComfyUI-GGUF (set COMFYUI_GGUF_PATH, and install gguf)"


def gguf_nodes():
    """The nodes of the pack that COMFYUI_GGUF_PATH names."""
    if "comfyui_gguf" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "comfyui_gguf", Path(os.environ["COMFYUI_GGUF_PATH"]) / "__init__.py"
        )
        sys.modules["comfyui_gguf"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["comfyui_gguf"])
    return sys.modules["comfyui_gguf.nodes"]


def write_gguf(path: Path, tensors: State) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "flux")
    for key, tensor in tensors.items():
        name = next((GGUF_KINDS[part] for part in GGUF_KINDS if f".{part}" in key and tensor.ndim == 2), "F32")
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(key, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# The kinds


def without(algorithm: str, parameter: str = "weight_scale") -> Callable[[], str]:
    def missing() -> str:
        from comfy.quant_ops import QUANT_ALGOS

        known = parameter in QUANT_ALGOS.get(algorithm, {}).get("parameters", ())
        return "" if known else f"this ComfyUI has no {algorithm} with {parameter}"

    return missing


TWO_BYTES = {"precision": "bfloat16", "gradient_checkpointing": True}
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
OF = "QuantizedTensor of"
KINDS = {
    "float32": Kind(cast(torch.float32), "float32"),
    "bfloat16": Kind(cast(torch.bfloat16), "bfloat16", flag="bf16_unet", rounding=2e-3),
    "bfloat16 in bfloat16": Kind(cast(torch.bfloat16), "bfloat16", flag="bf16_unet", rounding=2e-3, widgets=TWO_BYTES),
    "float16": Kind(cast(torch.float16), "float16", flag="fp16_unet"),
    "float16 in bfloat16": Kind(cast(torch.float16), "float16", flag="fp16_unet", widgets=TWO_BYTES),
    "float8": Kind(cast(FLOAT8), E4M3, flag="fp8_e4m3fn_unet", rounding=0.05),
    "float8 in bfloat16": Kind(cast(FLOAT8), E4M3, flag="fp8_e4m3fn_unet", rounding=0.05, widgets=TWO_BYTES),
    "float8 e5m2": Kind(cast(torch.float8_e5m2), E5M2, flag="fp8_e5m2_unet", rounding=0.1),
    "made float8": Kind(cast(torch.bfloat16), E4M3, "fp8_e4m3fn", rounding=0.05),
    "made float8, fast": Kind(cast(torch.bfloat16), E4M3, "fp8_e4m3fn_fast", rounding=0.05),
    "made float8 e5m2": Kind(cast(torch.bfloat16), E5M2, "fp8_e5m2", rounding=0.1),
    "scaled float8": Kind(quantised("scaled float8"), f"{OF} {E4M3}", rounding=0.05),
    "scaled float8, fast": Kind(quantised("scaled float8"), f"{OF} {E4M3}", fast=True, rounding=0.06),
    "scaled float8 in bfloat16": Kind(quantised("scaled float8"), f"{OF} {E4M3}", rounding=0.05, widgets=TWO_BYTES),
    "scaled float8 by the header": Kind(said_in_the_header("scaled float8"), f"{OF} {E4M3}", rounding=0.05),
    "old scaled float8": Kind(old_scaled_float8(2, None), f"{OF} {E4M3}", rounding=0.05),
    "old scaled float8, fast": Kind(old_scaled_float8(0, 0.05), f"{OF} {E4M3}", fast=True, rounding=0.06),
    "nvfp4": Kind(quantised("nvfp4"), f"{OF} uint8", rounding=0.2),
    "nvfp4, fast": Kind(quantised("nvfp4"), f"{OF} uint8", fast=True, rounding=0.25),
    # ComfyUI does not divide a patch by the scale, as it would have to.
    "nvfp4 with AWQ": Kind(smoothed_nvfp4, f"{OF} uint8", rounding=0.4, missing=without("nvfp4", "pre_quant_scale")),
    "mxfp8": Kind(quantised("mxfp8"), f"{OF} {E4M3}", rounding=0.05, missing=without("mxfp8")),
    "int8": Kind(quantised("int8"), f"{OF} int8", rounding=0.02, missing=without("int8_tensorwise")),
    "rotated int8": Kind(quantised("rotated int8"), f"{OF} int8", rounding=0.02, missing=without("int8_tensorwise")),
    "w4a8": Kind(quantised("w4a8"), f"{OF} int8", rounding=0.15, missing=without("asym_w4a8_int8")),
    "w4a4": Kind(quantised("w4a4"), f"{OF} int8", rounding=0.5, missing=without("convrot_w4a4")),
    "GGUF": Kind(mixed_gguf, "GGMLTensor of uint8", ending="gguf", missing=without_gguf),
    "GGUF in bfloat16": Kind(mixed_gguf, "GGMLTensor of uint8", ending="gguf", missing=without_gguf, widgets=TWO_BYTES),
}
