"""FLUX.1 in two namings: black-forest-labs/flux ("original", what ComfyUI runs) and diffusers.

The same numbers differ in three ways: names; q, k, v (and the MLP of single blocks) are rows of one fused
layer in the original; the two halves of the final modulation are (shift, scale) there and (scale, shift)
in diffusers. Everything below holds for any hidden size and depth.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# original module -> the diffusers modules whose output rows it stacks, in this order
OUTER: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
# (original block, diffusers block, what is inside)
STACKS = (("double_blocks", "transformer_blocks", DOUBLE), ("single_blocks", "single_transformer_blocks", SINGLE))
SWAPPED = "final_layer.adaLN_modulation.1"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
HEAD = 128  # every FLUX has heads of 128, split over three rotary axes
AXES = (16, 56, 56)


def flux_modules(depth: int, depth_single: int) -> dict[str, tuple[str, ...]]:
    """Every module with weights: original name -> the diffusers names that it stacks."""
    modules = dict(OUTER)
    for (original, diffusers, inside), count in zip(STACKS, (depth, depth_single), strict=True):
        for index in range(count):
            for ours, theirs in inside.items():
                modules[f"{original}.{index}.{ours}"] = tuple(f"{diffusers}.{index}.{name}" for name in theirs)
    return modules


def flux_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers FluxTransformer2DModel's state in original names. ValueError names what does not fit."""
    left = dict(state)
    original: dict[str, Tensor] = {}
    for ours, theirs in flux_modules(*_depths(left, side=1)).items():
        for kind in ("weight", "bias"):
            if not any(f"{name}.{kind}" in left for name in theirs):
                continue
            parts = [_take(left, f"{name}.{kind}") for name in theirs]
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            scale = "scale" if ours.endswith("_norm") else kind
            original[f"{ours}.{scale}"] = swap_halves(value) if ours == SWAPPED else value
    _refuse_rest(left, "diffusers")
    return original


def flux_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse. Takes the prefixes of whole checkpoints off; norms may be ``.scale`` (FLUX) or ``.weight``."""
    left = _plain(state)
    hidden = _take(dict(left), "img_in.weight").shape[0]
    diffusers: dict[str, Tensor] = {}
    for ours, theirs in flux_modules(*_depths(left, side=0)).items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" not in left:
                continue
            value = left.pop(f"{ours}.{kind}")
            value = swap_halves(value) if ours == SWAPPED else value
            for name, part in zip(theirs, split_rows(value, len(theirs), hidden), strict=True):
                diffusers[f"{name}.{kind}"] = part
    _refuse_rest(left, "original (black-forest-labs)")
    return diffusers


def flux_config(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Arguments of diffusers' FluxTransformer2DModel for a state in original names."""
    plain = _plain(state)
    depth, depth_single = _depths(plain, side=0)
    hidden, channels = _take(plain, "img_in.weight").shape
    head = _take(plain, "double_blocks.0.img_attn.norm.query_norm.weight").shape[0]
    if head != HEAD or hidden % head:
        raise ValueError(f"a FLUX has attention heads of {HEAD}, got {head} at hidden size {hidden}")
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": _take(plain, "final_layer.linear.weight").shape[0],
        "num_layers": depth,
        "num_single_layers": depth_single,
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": _take(plain, "txt_in.weight").shape[1],
        "pooled_projection_dim": _take(plain, "vector_in.in_layer.weight").shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in plain,
        "axes_dims_rope": AXES,
    }


def split_rows(value: Tensor, parts: int, hidden: int) -> tuple[Tensor, ...]:
    """Rows of a fused layer: one part is all of them, further ones are ``hidden`` each and the last is the rest."""
    return value.split([hidden] * (parts - 1) + [value.shape[0] - hidden * (parts - 1)])


def swap_halves(value: Tensor) -> Tensor:
    """(shift, scale) rows as (scale, shift), or back."""
    return torch.cat(value.chunk(2)[::-1])


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_plain_key(key): value for key, value in state.items()}


def _plain_key(key: str) -> str:
    for prefix in PREFIXES:
        if key.startswith(prefix):
            key = key[len(prefix) :]
    return key.removesuffix(".scale") + ".weight" if key.endswith("_norm.scale") else key


def _depths(state: Mapping[str, Tensor], *, side: int) -> tuple[int, ...]:
    """Numbers of double and single blocks; ``side`` 0 = original names, 1 = diffusers names."""
    return tuple(1 + max(_indices(state, stack[:2][side]), default=-1) for stack in STACKS)


def _indices(state: Mapping[str, Tensor], stack: str) -> Iterator[int]:
    pattern = re.compile(rf"{stack}\.(\d+)\.")
    return (int(match[1]) for key in state if (match := pattern.match(key)))


def _take(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"this is not a FLUX state: it has no {key} (its first keys: {', '.join(list(state)[:3])})")
    return state.pop(key)


def _refuse_rest(left: Mapping[str, Tensor], naming: str) -> None:
    if left:
        shown = ", ".join(sorted(left)[:5])
        raise ValueError(f"{len(left)} keys are not FLUX.1's in {naming} names, for example {shown}")
