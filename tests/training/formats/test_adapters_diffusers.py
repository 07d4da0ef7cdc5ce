"""Our files in diffusers: the readers of ``load_lora_weights`` take every tensor, and give the trained weights.

diffusers has no such reader for PixArt.
"""

import logging

import pytest
import torch
from adapter_models import config_for, metadata_for, randomise

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.formats.adapters import inspect_adapter, save_adapter

CROSS, POOLED = 16, 24
UNET = {"sample_size": 8, "block_out_channels": (16, 16), "norm_num_groups": 4, "cross_attention_dim": CROSS}


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=CROSS,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 6, 6),
    )


def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=CROSS,
        caption_projection_dim=24,
        pooled_projection_dim=POOLED,
        dual_attention_layers=(0,),
    )


def sd15():
    from diffusers import UNet2DConditionModel

    # Levels as in SD1.5, where the lowest has no attention.
    config = {**UNET, "block_out_channels": (8, 8, 16, 16), "attention_head_dim": 4}
    return UNet2DConditionModel(**config)


def sdxl():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{**UNET, "block_out_channels": (8, 16, 16)},
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


MODELS = {"flux": flux, "sd3": sd3, "sd15": sd15, "sdxl": sdxl}


def load(family, model, path):
    """As the family's pipeline loads it."""
    from diffusers import loaders

    mixin = {
        "flux": loaders.FluxLoraLoaderMixin,
        "sd3": loaders.SD3LoraLoaderMixin,
        "sd15": loaders.StableDiffusionLoraLoaderMixin,
        "sdxl": loaders.StableDiffusionXLLoraLoaderMixin,
    }[family]
    if family in ("sd15", "sdxl"):
        state, alphas, metadata = mixin.lora_state_dict(path, unet_config=model.config, return_lora_metadata=True)
        return mixin.load_lora_into_unet(state, alphas, model, metadata=metadata)
    state = mixin.lora_state_dict(path)
    return mixin.load_lora_into_transformer(state, *([None] if family == "flux" else []), transformer=model)


def layers_with_names(family, model):
    from torch import nn

    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] > 4
    ]


@pytest.mark.parametrize(
    ("family", "method", "style"),
    [
        *((family, "lora", None) for family in MODELS),
        ("flux", "rslora", "diffusers"),
        ("sd15", "rslora", "kohya"),
        ("flux", "dora", "diffusers"),
        ("sd3", "dora", "diffusers"),
        ("sdxl", "dora", "diffusers"),
        ("sdxl", "lora", "diffusers"),
    ],
)
def test_loads_complete(tmp_path, caplog, family, method, style):
    torch.manual_seed(0)
    model, other = MODELS[family](), MODELS[family]()
    other.load_state_dict(model.state_dict())
    names = layers_with_names(family, model)
    config = config_for(method, [name.replace(".", r"\.") for name in names])
    with attached(model, config, family=family, seed=0) as adapter:
        randomise(adapter)
        state = adapter.state_dict()
        trained = {name: model.get_submodule(name) for name in adapter.names}
        wanted = {}
        for name, layer in trained.items():
            layer.merge()
            wanted[name] = layer.get_base_layer().weight.detach().clone()
            layer.unmerge()
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, state, metadata_for(family, config), style)
    with caplog.at_level(logging.WARNING):
        load(family, other, str(path))
    assert not [record.message for record in caplog.records if "key" in record.message.lower()]
    other.fuse_lora()
    for name, weight in wanted.items():
        got = other.get_submodule(name).get_base_layer().weight
        torch.testing.assert_close(got, weight, atol=2e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    extra = sum(hasattr(module, "lora_A") for module in other.modules())
    assert extra == len(wanted)


def test_flux_in_kohyas_spelling(tmp_path):
    """At FLUX.1's own width, the only one that diffusers' reader knows; names and products are all there."""
    from diffusers.loaders import FluxLoraLoaderMixin

    generator = torch.Generator().manual_seed(0)
    shapes = {
        "transformer_blocks.3.attn.to_q": (3072, 3072),
        "transformer_blocks.3.attn.to_k": (3072, 3072),
        "transformer_blocks.3.attn.to_v": (3072, 3072),
        "transformer_blocks.3.attn.add_v_proj": (3072, 3072),  # one of three
        "transformer_blocks.3.attn.to_out.0": (3072, 3072),
        "transformer_blocks.3.norm1_context.linear": (3072, 18432),
        "transformer_blocks.3.ff.net.0.proj": (3072, 12288),
        "single_transformer_blocks.5.attn.to_q": (3072, 3072),
        "single_transformer_blocks.5.attn.to_k": (3072, 3072),
        "single_transformer_blocks.5.attn.to_v": (3072, 3072),
        "single_transformer_blocks.5.proj_mlp": (3072, 12288),
        "single_transformer_blocks.5.proj_out": (15360, 3072),
    }
    state = {}
    for name, (inputs, outputs) in shapes.items():
        state[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, state, metadata_for("flux", AdapterConfig(rank=2, alpha=5.0)))
    assert inspect_adapter(path).style == "kohya"
    read = FluxLoraLoaderMixin.lora_state_dict(str(path))
    for name in shapes:
        key = f"transformer.{name}.lora_"
        a, b = read.pop(f"{key}A.weight"), read.pop(f"{key}B.weight")
        rows, columns = slice(0, None, 97), slice(0, None, 89)
        want = 2.5 * state[f"{name}.lora_B.weight"][rows] @ state[f"{name}.lora_A.weight"][:, columns]
        torch.testing.assert_close(b[rows] @ a[:, columns], want, atol=1e-5, rtol=1e-5)
    assert all(
        not value.any() for key, value in read.items() if "lora_B" in key
    )  # k and q of the text: left as they are
    assert set(read) == {
        f"transformer.transformer_blocks.3.attn.add_{x}_proj.lora_{y}.weight" for x in "qk" for y in "AB"
    }
