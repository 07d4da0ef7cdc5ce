"""Layer names of Stable Diffusion's UNet in two layouts: diffusers' and the native one of CompVis and ComfyUI.

Native blocks are numbered through: ``n`` residual layers and one resampling a level, after the first convolution.
"""

import re

# diffusers -> native
OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
KINDS = ("resnets", "attentions")  # places 0 and 1 in a native block
# Native names of an upsampler count the attention before it, and SD1.5's first up block has none.
UP_BLOCKS_WITHOUT_ATTENTION = {"sd15": {0}, "sdxl": set()}


def unet_to_native(family: str, name: str, layers: int) -> str | None:
    """The native name of a diffusers layer, or None; ``layers`` = residual layers a level."""
    if name in OUTER:
        return OUTER[name]
    if match := re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.+)", name):
        return f"{MIDDLE[match[1]]}.{_inner(match[2])}" if match[1] in MIDDLE else None
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        index, place = int(match[2]) * (layers + 1) + int(match[4]), KINDS.index(match[3])
        block = f"input_blocks.{index + 1}" if match[1] == "down" else f"output_blocks.{index}"
        return f"{block}.{place}.{_inner(match[5])}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", name):
        level = int(match[1])
        place = 1 if level in UP_BLOCKS_WITHOUT_ATTENTION[family] else 2
        return f"output_blocks.{level * (layers + 1) + layers}.{place}.conv"
    return None


def unet_to_diffusers(name: str, layers: int) -> str | None:
    """The inverse. ValueError where the name cannot be of a UNet with so many layers a level."""
    for ours, native in OUTER.items():
        if name == native:
            return ours
    for ours, native in MIDDLE.items():
        if name.startswith(f"{native}."):
            return f"mid_block.{ours}.{_outer(name[len(native) + 1 :])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", name)
    if not match:
        return None
    side, rest = ("down", match[4]) if match[1] == "input" else ("up", match[4])
    level, layer = divmod(int(match[2]) - (side == "down"), layers + 1)
    if rest == "op":
        _require(side == "down" and layer == layers, name, layers)
        return f"down_blocks.{level}.downsamplers.0.conv"
    if rest == "conv":
        _require(side == "up" and layer == layers, name, layers)
        return f"up_blocks.{level}.upsamplers.0.conv"
    _require(layer < layers + (side == "up") and match[3] in "01", name, layers)
    return f"{side}_blocks.{level}.{KINDS[int(match[3])]}.{layer}.{_outer(rest)}"


def _inner(name: str) -> str:
    return RESNET.get(name, name)


def _outer(name: str) -> str:
    return next((ours for ours, native in RESNET.items() if native == name), name)


def _require(fits: bool, name: str, layers: int) -> None:
    if not fits:
        raise ValueError(
            f"the layer {name} does not exist in a UNet with {layers} residual layers a level: "
            "give the model's number as unet_layers in the adapter's metadata"
        )
