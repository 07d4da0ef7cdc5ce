"""Layer names of transformers in two layouts: diffusers', and the native one of the original repository and ComfyUI.

Both have the same numbers under other names, and where diffusers has q, k and v, the native layout has their rows
stacked in one fused layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from . import keys_flux


@dataclass(frozen=True)
class NativePlace:
    """Where a diffusers layer is in the native layout: which of the stacked parts of which module."""

    module: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class TransformerNames:
    """The two namings of one family. Tables are native name -> the diffusers names that it stacks, in order."""

    outer: Mapping[str, tuple[str, ...]]
    stacks: tuple[tuple[str, str, Mapping[str, tuple[str, ...]]], ...]  # native stack, diffusers stack, inside a block
    # Ends of native names whose two output halves are (shift, scale) there and (scale, shift) in diffusers.
    swapped: tuple[str, ...] = ()

    def to_diffusers(self, native: str) -> tuple[str, ...] | None:
        """The diffusers names of a native layer; None for a name that is not native."""
        if native in self.outer:
            return self.outer[native]
        for ours, theirs, inside in self.stacks:
            match = re.fullmatch(rf"{ours}\.(\d+)\.(.+)", native)
            if match and match[2] in inside:
                return tuple(f"{theirs}.{match[1]}.{name}" for name in inside[match[2]])
        return None

    def to_native(self, diffusers: str) -> NativePlace | None:
        """The place of a diffusers layer; None for a name that is not diffusers'."""
        for ours, names in self.outer.items():
            if diffusers in names:
                return NativePlace(ours, names.index(diffusers), len(names))
        for ours, theirs, inside in self.stacks:
            if match := re.fullmatch(rf"{theirs}\.(\d+)\.(.+)", diffusers):
                for name, names in inside.items():
                    if match[2] in names:
                        return NativePlace(f"{ours}.{match[1]}.{name}", names.index(match[2]), len(names))
        return None


_TIME_AND_POOLED = {
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
}
SD3 = TransformerNames(
    outer={
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        **_TIME_AND_POOLED,
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    stacks=(
        (
            "joint_blocks",
            "transformer_blocks",
            {
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),  # SD3.5-medium
                "x_block.attn.proj": ("attn.to_out.0",),
                "context_block.attn.proj": ("attn.to_add_out",),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
            },
        ),
    ),
    # In the context stream only the last block's has two parts; elsewhere it has six, in the same order in both.
    swapped=("final_layer.adaLN_modulation.1", "context_block.adaLN_modulation.1"),
)
PIXART = TransformerNames(
    outer={
        "x_embedder.proj": ("pos_embed.proj",),
        "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
        "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
        "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
        "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
        "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
        "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
        "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
        "t_block.1": ("adaln_single.linear",),
        "final_layer.linear": ("proj_out",),
    },
    stacks=(
        (
            "blocks",
            "transformer_blocks",
            {
                "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                "attn.proj": ("attn1.to_out.0",),
                "cross_attn.q_linear": ("attn2.to_q",),
                "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
                "cross_attn.proj": ("attn2.to_out.0",),
                "mlp.fc1": ("ff.net.0.proj",),
                "mlp.fc2": ("ff.net.2",),
            },
        ),
    ),
)
FLUX = TransformerNames(keys_flux.OUTER, keys_flux.STACKS, (keys_flux.SWAPPED,))

TRANSFORMERS: dict[str, TransformerNames] = {"flux": FLUX, "sd3": SD3, "pixart": PIXART}
