"""The tiny models of conftest.py with their weights kept in every form that ComfyUI knows."""

import json

import torch

FLOAT8 = torch.float8_e4m3fn

# form -> (type of the stored weights, type that is computed in)
CAST = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float8": (FLOAT8, torch.float32),
    "float8 in bfloat16": (FLOAT8, torch.bfloat16),
}
# form -> (ComfyUI's name of the format, options of its quantisation, what the file says of them)
GROUPS = {"convrot_groupsize": 16}
QUANTISED = {
    "scaled float8": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "scaled float8 e5m2": ("float8_e5m2", {"scale": "recalculate"}, {}),
    "nvfp4": ("nvfp4", {}, {}),
    "mxfp8": ("mxfp8", {}, {}),
    "int8": ("int8_tensorwise", {"per_channel": True}, {}),
    "rotated int8": ("int8_tensorwise", {"per_channel": True, "convrot": True, **GROUPS}, {"convrot": True, **GROUPS}),
    "w4a4": ("convrot_w4a4", GROUPS, GROUPS),
    "w4a8": ("asym_w4a8_int8", {"group_size": 16, **GROUPS}, {"group_size": 16, **GROUPS}),
}


def known_forms() -> list[str]:
    """Those that this version of ComfyUI has."""
    from comfy.quant_ops import QUANT_ALGOS

    return [*CAST, *(form for form, (name, *_) in QUANTISED.items() if name in QUANT_ALGOS)]


def stored(dense, form: str, *, fast: bool = False):
    """A MODEL like ``dense``, kept in this form, made under inference mode as loader nodes do.

    ``fast``: quantised formats multiply in their own type, as on a GPU that can; a few can on the CPU, too.
    """
    with torch.inference_mode():
        if form in CAST:
            return cast_model(dense, *CAST[form])
        return quantised_model(dense, *QUANTISED[form], fast=fast)


def cast_model(dense, dtype: torch.dtype, compute: torch.dtype):
    model = empty_model(dense, dtype, compute)
    model.model.load_state_dict(dense.model.state_dict())
    return model


def quantised_model(dense, name: str, options: dict, said: dict, *, fast: bool):
    """The linear layers of the blocks quantised, as files of this kind are."""
    model = empty_model(dense, torch.float32, torch.float32, quant_config={"mixed_ops": True})
    model.model.diffusion_model.load_state_dict(quantised_state(dense, name, options, said, fast=fast))
    if fast:  # ComfyUI has decided by the device that it cannot
        for part in model.model.modules():
            if "_full_precision_mm" in vars(part):
                part._full_precision_mm = False
    return model


def quantised_state(dense, name: str, options: dict, said: dict, *, fast: bool) -> dict[str, torch.Tensor]:
    """The tensors of a file, under the names that they have in the diffusion model."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    state = {}
    for key, tensor in dense.model.diffusion_model.state_dict().items():
        layer = key.removesuffix("weight")
        if "blocks" in key and key.endswith("weight") and tensor.ndim == 2 and is_linear(dense, layer[:-1]):
            quantised = QuantizedTensor.from_float(tensor, QUANT_ALGOS[name]["comfy_tensor_layout"], **options)
            suffixes = quantised.state_dict("")
            state |= {f"{layer}weight{suffix}".replace("weightweight", "weight"): t for suffix, t in suffixes.items()}
            marker = {"format": name, **said, **({} if fast else {"full_precision_matrix_mult": True})}
            state[f"{layer}comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
        else:
            state[key] = tensor
    return state


def is_linear(model, name: str) -> bool:
    return "in_features" in vars(model.model.diffusion_model.get_submodule(name))


def empty_model(dense, dtype: torch.dtype, compute: torch.dtype, quant_config=None):
    import comfy.model_patcher

    before = dense.model.model_config
    config = type(before)({**before.unet_config, "dtype": dtype})
    config.set_inference_dtype(dtype, compute if quant_config or compute is not dtype else None)
    config.quant_config = quant_config
    cpu = torch.device("cpu")
    model = config.get_model({}, "", device=cpu).requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)
