"""The weights of a diffusers folder in the names of the repositories that the models came from: single files."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file


def read(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / part).glob("*.safetensors")))


def renamed(state: dict[str, torch.Tensor], rules: list[tuple[str, str]], prefix: str = "") -> dict[str, torch.Tensor]:
    """Every rule applied to every key, in order."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[prefix + key] = value
    return result


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys with "@0", "@1", … stacked under the name without them."""
    result = {}
    for key in sorted(state, key=lambda key: (re.sub("@.", "", key), key)):
        name = re.sub("@.", "", key)
        result[name] = torch.cat([result[name], state[key]]) if name in result else state[key]
    return result


RESNET = [
    (r"norm1\.", "in_layers.0."),
    (r"conv1\.", "in_layers.2."),
    (r"norm2\.(?=\w+$)", "out_layers.0."),
    (r"conv2\.", "out_layers.3."),
    (r"time_emb_proj\.", "emb_layers.1."),
    (r"conv_shortcut\.", "skip_connection."),
]
UNET = [
    (r"^conv_in", "input_blocks.0.0"),
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    # one residual block a level on the way down, two on the way up
    (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
    (r"^down_blocks\.1\.attentions\.0", "input_blocks.3.1"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
    (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.2.conv"),
    (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
    (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
]
VAE = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.0\.resnets", "up.1.block"),
    (r"up_blocks\.1\.resnets", "up.0.block"),
    (r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]
SD3 = [
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks", "joint_blocks"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"attn(2?)\.to_q", r"x_block.attn\1.qkv@0"),
    (r"attn(2?)\.to_k", r"x_block.attn\1.qkv@1"),
    (r"attn(2?)\.to_v", r"x_block.attn\1.qkv@2"),
    (r"attn\.add_q_proj", "context_block.attn.qkv@0"),
    (r"attn\.add_k_proj", "context_block.attn.qkv@1"),
    (r"attn\.add_v_proj", "context_block.attn.qkv@2"),
    (r"attn(2?)\.norm_([qk])\.", r"x_block.attn\1.ln_\2."),
    (r"attn\.norm_added_([qk])\.", r"context_block.attn.ln_\1."),
    (r"attn(2?)\.to_out\.0", r"x_block.attn\1.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
]
PIXART = [
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^caption_projection\.linear_(\d)", r"y_embedder.y_proj.fc\1"),
    (r"^adaln_single\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^adaln_single\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^adaln_single\.emb\.resolution_embedder\.linear_1", "csize_embedder.mlp.0"),
    (r"^adaln_single\.emb\.resolution_embedder\.linear_2", "csize_embedder.mlp.2"),
    (r"^adaln_single\.emb\.aspect_ratio_embedder\.linear_1", "ar_embedder.mlp.0"),
    (r"^adaln_single\.emb\.aspect_ratio_embedder\.linear_2", "ar_embedder.mlp.2"),
    (r"^adaln_single\.linear", "t_block.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
    (r"^transformer_blocks", "blocks"),
    (r"attn1\.to_q", "attn.qkv@0"),
    (r"attn1\.to_k", "attn.qkv@1"),
    (r"attn1\.to_v", "attn.qkv@2"),
    (r"attn1\.to_out\.0", "attn.proj"),
    (r"attn2\.to_q", "cross_attn.q_linear"),
    (r"attn2\.to_k", "cross_attn.kv_linear@0"),
    (r"attn2\.to_v", "cross_attn.kv_linear@1"),
    (r"attn2\.to_out\.0", "cross_attn.proj"),
    (r"ff\.net\.0\.proj", "mlp.fc1"),
    (r"ff\.net\.2", "mlp.fc2"),
]


def unet_file(folder: Path) -> dict[str, torch.Tensor]:
    state = renamed(read(folder, "unet"), UNET, "model.diffusion_model.")
    resnets = {key: value for key, value in state.items() if "transformer_blocks" not in key}
    return {**{key: state[key] for key in state.keys() - resnets.keys()}, **renamed(resnets, RESNET)}


def sd15_file(folder: Path) -> dict[str, torch.Tensor]:
    """A whole checkpoint: UNet, autoencoder and text encoder."""
    text = renamed(
        read(folder, "text_encoder"), [(r"^(text_model\.)?", "text_model.")], "cond_stage_model.transformer."
    )
    return unet_file(folder) | renamed(read(folder, "vae"), VAE, "first_stage_model.") | text


def flux_file(folder: Path) -> dict[str, torch.Tensor]:
    """With ComfyUI's prefix and nothing but the transformer."""
    from stylewright.training.formats.keys_flux import flux_to_original

    return renamed(flux_to_original(read(folder, "transformer")), [], "model.diffusion_model.")


def sd3_file(folder: Path) -> dict[str, torch.Tensor]:
    state = fused(renamed(read(folder, "transformer"), SD3))
    swapped = [key for key in state if re.search(r"final_layer\.adaLN|1\.context_block\.adaLN", key)]
    return {key: torch.cat(value.chunk(2)[::-1]) if key in swapped else value for key, value in state.items()}


def pixart_file(folder: Path) -> dict[str, torch.Tensor]:
    empty_prompt = {"y_embedder.y_embedding": torch.zeros(120, 32)}
    return fused(renamed(read(folder, "transformer"), PIXART)) | empty_prompt


SINGLE_FILES = {"sd15": sd15_file, "sdxl": unet_file, "flux": flux_file, "sd3": sd3_file, "pixart": pixart_file}
