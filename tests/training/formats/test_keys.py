"""Names of layers: each layout into the other and back, and FLUX's whole checkpoints."""

import pytest
import torch
from adapter_models import NATIVE

from stylewright.training.formats.keys import detect_family, diffusers_names, layout_of, native_place
from stylewright.training.formats.keys_flux import flux_config, flux_to_diffusers, flux_to_original
from stylewright.training.formats.keys_transformers import TRANSFORMERS
from stylewright.training.formats.spelling import read_key, write_name


def tiny_flux(guidance):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56),
    )


@pytest.fixture(scope="module")
def flux_model():
    model = tiny_flux(guidance=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def test_flux_checkpoint_there_and_back(flux_model):
    state = flux_model.state_dict()
    original = flux_to_original(state)
    back = flux_to_diffusers(original)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert original["single_blocks.2.linear1.weight"].shape == (7 * 256, 256)
    assert original["double_blocks.1.txt_attn.norm.key_norm.scale"].shape == (128,)
    config = flux_config(original)
    assert config.pop("out_channels") == flux_model.out_channels
    assert config == {key: value for key, value in flux_model.config.items() if key in config}
    assert flux_config(flux_to_original(tiny_flux(guidance=False).state_dict()))["guidance_embeds"] is False


def test_flux_checkpoint_as_others_spell_it(flux_model):
    """With a whole checkpoint's prefix, and ComfyUI's name for the scales of norms."""
    original = flux_to_original(flux_model.state_dict())
    spelled = {f"model.diffusion_model.{key.replace('_norm.scale', '_norm.weight')}": v for key, v in original.items()}
    assert flux_config(spelled) == flux_config(original)
    assert flux_to_diffusers(spelled).keys() == flux_model.state_dict().keys()


def test_flux_matches_diffusers_own_converter(flux_model):
    """Theirs is for hidden size 3072 only, so all but the single blocks' fused layers."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    original = flux_to_original(flux_model.state_dict())
    for key in list(original):
        if "linear1" in key:
            original[key] = torch.zeros(21504, *original[key].shape[1:])
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    for key, value in flux_model.state_dict().items():
        if not key.startswith("single_transformer_blocks") or "norm" in key or "proj_out" in key:
            assert torch.equal(theirs[key], value), key


def test_flux_checkpoints_that_are_none(flux_model):
    state = flux_model.state_dict()
    with pytest.raises(ValueError, match=r"1 keys are not FLUX\.1's in diffusers names, for example extra"):
        flux_to_original({**state, "extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"not a FLUX state: it has no img_in\.weight"):
        flux_to_diffusers({"some.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="not a FLUX state: it has no"):
        flux_to_original({key: value for key, value in state.items() if "attn.to_k.weight" not in key})
    narrow = {**flux_to_original(state), "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(32)}
    with pytest.raises(ValueError, match="heads of 128, got 32"):
        flux_config(narrow)


@pytest.mark.parametrize("family", NATIVE)
def test_there_and_back(family):
    for name in NATIVE[family]():
        names = diffusers_names(family, name)
        assert names, name
        for part, other in enumerate(names):
            place = native_place(family, other)
            assert (place.module, place.part, place.parts) == (name, part, len(names))
    assert layout_of(family, NATIVE[family]()) == "native"
    assert (
        layout_of(family, [part for name in NATIVE[family]() for part in diffusers_names(family, name)]) == "diffusers"
    )
    assert detect_family(NATIVE[family]()) == family or family == "sdxl"


DOUBLE, SINGLE = "lora_unet_double_blocks_0", "lora_unet_single_blocks_0"
THEIR_DOUBLE, THEIR_SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"


@pytest.mark.parametrize(
    ("family", "keys"),
    [  # as other tools write them
        ("chroma", [f"{SINGLE}_linear1", "diffusion_model.distilled_guidance_layer.layers.0.in_layer"]),
        ("chroma", [f"{SINGLE}_linear1", "lora_unet_distilled_guidance_layer_in_proj"]),
        ("chroma", [f"{THEIR_DOUBLE}.attn.to_q", "transformer.distilled_guidance_layer.out_proj"]),
        ("chroma-radiance", [f"{DOUBLE}_img_attn_qkv", "lora_unet_nerf_blocks_0_param_generator"]),
        ("hunyuan-video", ["transformer.double_blocks.0.img_attn_qkv"]),
        ("hunyuan-video", ["diffusion_model.double_blocks.0.txt_mlp.fc2", f"{SINGLE}_linear1"]),
        ("hunyuan-video", [f"{DOUBLE}_img_mod_linear", f"{DOUBLE}_img_attn_qkv"]),
        ("hunyuan-video", ["lora_unet_txt_in_individual_token_refiner_blocks_0_self_attn_qkv", f"{SINGLE}_linear2"]),
        ("hunyuan-video", [THEIR_SINGLE, "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q"]),
        ("flux2", [f"{THEIR_SINGLE}.attn.to_qkv_mlp_proj"]),
        ("qwen-image", [f"{THEIR_DOUBLE}.attn.add_q_proj", f"{THEIR_DOUBLE}.img_mlp.net.2"]),
        ("flux", [f"{DOUBLE}_img_attn_qkv", f"{DOUBLE}_img_mod_lin", f"{DOUBLE}_img_mlp_0"]),
        ("flux", [f"{THEIR_SINGLE}.attn.to_q", f"{THEIR_DOUBLE}.attn.add_q_proj"]),
        ("flux", ["diffusion_model.single_blocks.0.modulation.lin"]),
        ("sd3", [f"{THEIR_DOUBLE}.attn.add_q_proj", f"{THEIR_DOUBLE}.ff.net.2"]),
    ],
)
def test_flux_s_kin_are_told_apart_by_their_own_layers(family, keys):
    names = [read_key(f"{key}.lora_down.weight")[0] for key in keys]
    assert detect_family(names) == family


def test_tables_have_no_name_twice():
    for names in TRANSFORMERS.values():
        for _, _, inside in names.stacks:
            parts = [part for parts in inside.values() for part in parts]
            assert len(set(parts)) == len(parts)


@pytest.mark.parametrize(
    ("family", "diffusers", "native"),
    [  # as in the published checkpoints
        ("sd15", "down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("sd15", "down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("sd15", "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("sd15", "mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("sd15", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("sd15", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("sd15", "up_blocks.3.attentions.2.proj_out", "output_blocks.11.1.proj_out"),
        ("sdxl", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
         "input_blocks.8.1.transformer_blocks.9.attn2.to_k"),
        ("sdxl", "up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("sdxl", "add_embedding.linear_2", "label_emb.0.2"),
    ],
)  # fmt: skip
def test_unet_names(family, diffusers, native):
    assert native_place(family, diffusers).module == native
    assert diffusers_names(family, native) == (diffusers,)


def test_layouts_that_are_none():
    with pytest.raises(ValueError, match=r"blocks\.0\.linear is no layer of the family 'flux'"):
        layout_of("flux", ["blocks.0.linear"])
    with pytest.raises(ValueError, match="mix"):
        layout_of("flux", ["double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q"])
    assert detect_family(["layers.0.attention"]) is None


@pytest.mark.parametrize("family", NATIVE)
def test_kohyas_underscores_come_back_as_dots(family):
    natives = list(NATIVE[family]())
    for layout, names in {
        "native": natives,
        "diffusers": [part for name in natives for part in diffusers_names(family, name)],
    }.items():
        for name in names:
            assert read_key(f"lora_unet_{name.replace('.', '_')}.lora_up.weight") == (name, "B")
            for style in ("kohya", "comfyui", "diffusers", "peft"):
                spelled = write_name(style, family, layout, name)
                assert read_key(f"{spelled}.alpha") == (name, "alpha"), spelled


@pytest.mark.parametrize(
    ("key", "name", "tensor"),
    [
        ("lora_te1_text_model_encoder_layers_11_self_attn_out_proj.lora_down.weight",
         "text_encoder.text_model.encoder.layers.11.self_attn.out_proj", "A"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
         "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "alpha"),
        ("base_model.model.blocks.0.attn.to_q.lora_A.default.weight", "blocks.0.attn.to_q", "A"),
        ("unet.base_model.model.blocks.0.attn1.to_q.lora_B.weight", "blocks.0.attn1.to_q", "B"),
        ("lycoris_transformer_blocks_0_attn_add_k_proj.lokr_w2_a", "transformer_blocks.0.attn.add_k_proj", "lokr_w2_a"),
        ("diffusion_model.single_blocks.3.linear1.dora_scale", "single_blocks.3.linear1", "dora_scale"),
    ],
)  # fmt: skip
def test_keys_of_other_tools(key, name, tensor):
    assert read_key(key) == (name, tensor)
    assert read_key(f"{name}.weight") is None
