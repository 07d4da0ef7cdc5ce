"""The models of models.py in ComfyUI's own layout, of random weights, made by ComfyUI's classes.

Sizes are what ComfyUI detects in a checkpoint. To be called after ``open_comfyui``.
"""

from dataclasses import dataclass
from typing import Any

import torch

FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "mlp_ratio": 4.0, "axes_dim": [16, 56, 56],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip
SMALL_FLUX = {
    **FLUX, "vec_in_dim": 128, "context_in_dim": 256, "hidden_size": 384, "num_heads": 3, "depth": 2,
    "depth_single_blocks": 4, "guidance_embed": False,
}  # fmt: skip
FLUX_DEV = {
    **FLUX, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "num_heads": 24, "depth": 19,
    "depth_single_blocks": 38, "guidance_embed": True,
}  # fmt: skip
SMALL_SD3 = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "input_size": None, "adm_in_channels": 128,
    "depth": 6, "num_blocks": 4,  # of 6 heads of 64
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": 256, "out_features": 384},
    },
    "num_patches": 96 * 96, "pos_embed_max_size": 96, "pos_embed_scaling_factor": None,
}  # fmt: skip
UNET = {
    "image_size": 32, "use_checkpoint": False, "in_channels": 4, "out_channels": 4, "legacy": False,
    "use_spatial_transformer": True, "use_linear_in_transformer": True, "num_classes": "sequential", "num_heads": -1,
    "num_head_channels": 64, "use_temporal_resblock": False, "use_temporal_attention": False,
}  # fmt: skip
SMALL_SDXL = {
    **UNET, "model_channels": 64, "channel_mult": [1, 2], "num_res_blocks": [2, 2], "context_dim": 256,
    "transformer_depth": [0, 0, 2, 2], "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 0, 2, 2, 2],
    "adm_in_channels": 128 + 6 * 256,
}  # fmt: skip
SDXL = {
    **UNET, "model_channels": 320, "channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2], "context_dim": 2048,
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "adm_in_channels": 2816,
}  # fmt: skip


@dataclass(frozen=True)
class ComfyKind:
    supported: str  # class in comfy.supported_models
    config: dict[str, Any]


COMFY_KINDS = {
    "flux": ComfyKind("Flux", SMALL_FLUX),
    "sd3": ComfyKind("SD3", SMALL_SD3),
    "sdxl": ComfyKind("SDXL", SMALL_SDXL),
    "flux-dev": ComfyKind("Flux", FLUX_DEV),
    "sdxl-base": ComfyKind("SDXL", SDXL),
}


def comfyui_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    inference: bool = True,  # made in inference mode, as by a loader node
) -> Any:
    """A loaded ModelPatcher, whose weights are made on ``device``."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    kind = COMFY_KINDS[name]
    where = torch.device(device)
    with torch.inference_mode(inference):
        config = getattr(comfy.supported_models, kind.supported)({**kind.config, "dtype": dtype})
        config.unet_config |= kind.config  # a class may state sizes of its own
        config.unet_config.pop("attention_resolutions", None)  # by which ComfyUI tells checkpoints apart
        config.set_inference_dtype(dtype, None)
        model = config.get_model({}, "", device=where).requires_grad_(False)
        fill(model, where)
        patcher = comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), where)
        comfy.model_management.load_models_gpu([patcher])
    return patcher


def fill(model: Any, device: torch.device) -> None:
    """Random weights with which every layer passes on about as much as it gets. SD3's table of positions as well."""
    source = torch.Generator(device).manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.diffusion_model.named_buffers()):
        if tensor.is_floating_point():
            spread = 1 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1
            tensor.normal_(std=spread, generator=source)
            if tensor.ndim == 1 and name.endswith(("weight", "scale")):
                tensor.add_(1)  # of a norm
