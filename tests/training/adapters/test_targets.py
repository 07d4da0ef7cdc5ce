"""Targets: the paper's lists, both layouts of each family, and what is said where nothing fits."""

import pytest
import torch
from torch import nn

from stylewright.training.adapters.targets import TARGETS, grouped, resolve_targets, target_patterns
from stylewright.training.formats.keys_flux import flux_to_original

# arXiv 2411.14793v3, Fig. S3
PAPER = {
    "flux": ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "proj_mlp", "proj_out"],
    "sd3": ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"],
}


def flux(depth=2, depth_single=3):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(
            num_layers=depth, num_single_layers=depth_single, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip


def sd3():
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        return SD3Transformer2DModel(
            num_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
            caption_projection_dim=32, pooled_projection_dim=12, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip


def unet():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip


def pixart():
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        return PixArtTransformer2DModel(
            num_layers=2, attention_head_dim=16, num_attention_heads=2, caption_channels=24, cross_attention_dim=32,
            sample_size=32,
        )  # fmt: skip


def tree(names):
    """A module tree with a linear layer at each of these names."""
    root = nn.Module()
    for name in names:
        parent = root
        *path, last = name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, nn.Linear(2, 2))
    return root


# What ComfyUI calls the layers of the original layouts (0.14.0 and 0.33.0 alike), one or two blocks of each kind.
NATIVE = {
    "flux": [
        "img_in", "time_in.in_layer", "time_in.out_layer", "txt_in", "final_layer.linear",
        "final_layer.adaLN_modulation.1", "single_blocks.0.linear1", "single_blocks.0.linear2",
        "single_blocks.0.modulation.lin",
        *(f"double_blocks.{i}.{stream}_{layer}" for i in (0, 1) for stream in ("img", "txt")
          for layer in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")),
    ],
    "sd3": [
        "x_embedder.proj", "t_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder", "final_layer.linear",
        "final_layer.adaLN_modulation.1", "joint_blocks.0.x_block.attn2.qkv", "joint_blocks.0.x_block.attn2.proj",
        "joint_blocks.1.context_block.attn.qkv", "joint_blocks.1.context_block.adaLN_modulation.1",
        *(f"joint_blocks.{block}.{layer}" for block in ("0.x_block", "0.context_block", "1.x_block")
          for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")),
    ],
    "sdxl": [
        "time_embed.0", "time_embed.2", "label_emb.0.0", "input_blocks.0.0", "input_blocks.1.0.in_layers.2",
        "input_blocks.1.0.emb_layers.1", "input_blocks.1.0.out_layers.3", "input_blocks.1.0.skip_connection",
        "input_blocks.3.0.op", "output_blocks.2.2.conv", "out.2",
        *(f"{block}.{layer}" for block in ("input_blocks.4.1", "middle_block.1", "output_blocks.0.1")
          for layer in ("proj_in", "proj_out", "transformer_blocks.0.ff.net.0.proj",
                        "transformer_blocks.0.ff.net.2")),
        *(f"{block}.transformer_blocks.0.attn{n}.{layer}" for n in (1, 2)
          for block in ("input_blocks.4.1", "middle_block.1", "output_blocks.0.1")
          for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    ],
    "pixart": [
        "t_block.1", "x_embedder.proj", "t_embedder.mlp.0", "y_embedder.y_proj.fc1", "final_layer.linear",
        *(f"blocks.{i}.{layer}" for i in (0, 1)
          for layer in ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj",
                        "mlp.fc1", "mlp.fc2")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family, model", [("flux", flux), ("sd3", sd3)])
def test_style_is_the_papers_list_without_the_last_projection(family, model):
    model = model()
    by_ends = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{end}") for end in PAPER[family])
    ]
    found = resolve_targets(model, TARGETS[family]["style"])
    assert by_ends == found + (["proj_out"] if family == "flux" else [])  # the model's last layer


def test_sizes_of_the_papers_lists_on_the_published_models():
    # FLUX.1-dev: 19 double blocks with 7 layers, 38 single ones with 5.
    assert len(resolve_targets(flux(19, 38), TARGETS["flux"]["style"])) == 19 * 7 + 38 * 5


@pytest.mark.parametrize("preset", ["style", "image-attention", "all"])
def test_flux_presets_are_the_same_in_both_layouts(preset):
    model = flux(2, 2)
    chosen = set(resolve_targets(model, TARGETS["flux"][preset]))
    marked = {
        name: torch.full(tensor.shape, float(name.rpartition(".")[0] in chosen), device="cpu")
        for name, tensor in model.state_dict().items()
    }
    fused = flux_to_original(marked)
    layers = {name.rpartition(".")[0] for name, weight in fused.items() if weight.ndim == 2}
    expected = {name.rpartition(".")[0] for name, weight in fused.items() if weight.ndim == 2 and weight.all()}
    assert set(resolve_targets(tree(sorted(layers)), TARGETS["flux"][preset])) == expected


@pytest.mark.parametrize("family", NATIVE)
def test_presets_know_the_native_layout(family):
    inside = [name for name in grouped(NATIVE[family]) if "block" in name]
    attention = {name for name in inside if "attn" in name or ".linear" in name}
    found = set(grouped(resolve_targets(tree(NATIVE[family]), TARGETS[family]["style"])))
    assert found == attention - {"double_blocks.*.txt_attn.proj"}
    feed_forward = {name for name in inside if "mlp." in name or ".ff." in name or ".proj_" in name}
    assert set(grouped(resolve_targets(tree(NATIVE[family]), TARGETS[family]["all"]))) == attention | feed_forward


@pytest.mark.parametrize("family, model", [("sdxl", unet), ("sd15", unet), ("pixart", pixart)])
def test_attention_of_both_kinds_in_diffusers(family, model):
    model = model()
    attention = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".attn" in name]
    assert resolve_targets(model, TARGETS[family]["style"]) == attention
    crossing = [name for name in attention if ".attn2." in name]
    assert resolve_targets(model, TARGETS[family]["cross-attention"]) == crossing


@pytest.mark.parametrize("model", [flux, sd3, unet, pixart])
def test_the_generic_preset_leaves_steering_layers_and_convolutions_alone(model):
    model = model()
    found = resolve_targets(model, TARGETS["other"]["all"])
    for name in found:
        assert not any(word in name for word in ("norm", "embed", "time", "conv", "resnets"))
        assert model.get_submodule(name).weight.ndim == 2 or model.get_submodule(name).kernel_size == (1, 1)
    mixing = r".*\.ff\w*\.net\..*|.*\.attn\w*\..*|.*\.proj_(?:mlp|in)|.*block.*\.proj_out"
    assert found == [name for name in resolve_targets(model, [mixing]) if "norm" not in name]


def test_names_come_in_the_models_order_and_once():
    model = tree(["b.1.x", "b.0.x", "a.y"])
    assert resolve_targets(model, ["y", r"x|y", "a.y"]) == ["b.1.x", "b.0.x", "a.y"]


def test_a_pattern_matches_whole_parts_of_a_name():
    model = tree(["0.to_q", "0.into_q", "0.to_q_scale"])
    assert resolve_targets(model, ["to_q"]) == ["0.to_q"]


def test_a_pattern_that_matches_nothing_lists_what_exists():
    model = tree(NATIVE["flux"])
    with pytest.raises(ValueError, match=r"'img_attn.q' matches no layer") as error:
        resolve_targets(model, [r"img_attn\.qkv", "img_attn.q"])
    assert "double_blocks.*.img_attn.qkv, double_blocks.*.img_attn.proj" in str(error.value)
    assert "double_blocks.0" not in str(error.value)


def test_patterns_are_checked():
    with pytest.raises(ValueError, match=r"no regular expression: .*at position 3"):
        resolve_targets(tree(["a"]), ["to_(q"])
    with pytest.raises(ValueError, match="no targets"):
        resolve_targets(tree(["a"]), [])


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'atention'.*flux.*style, attention, image-attention, kv_text, kv_both, all"):
        target_patterns("flux", "atention")


def test_an_unknown_family_gets_the_generic_presets():
    assert target_patterns("never heard of", "style") == TARGETS["other"]["style"]
    assert target_patterns("never heard of", ["to_q"]) == ("to_q",)


def test_a_quantised_layer_counts_by_its_sizes():
    class Linear8(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 2, 3

    class Mlp(nn.Sequential):
        """Says its sizes, too, and is no single product."""

        def __init__(self):
            super().__init__(nn.Linear(2, 3))
            self.in_features, self.out_features = 2, 3

    model = tree(["blocks.0.to_q"])
    model.get_submodule("blocks.0").to_k = Linear8()
    model.get_submodule("blocks.0").to_v = Mlp()
    assert resolve_targets(model, ["to_[qkv]"]) == ["blocks.0.to_q", "blocks.0.to_k"]


def test_every_family_has_the_default_and_the_widest_preset():
    assert all({"style", "all"} <= presets.keys() for presets in TARGETS.values())
