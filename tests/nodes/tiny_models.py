"""Tiny random models of every family, made by ComfyUI's own classes, and what a text encoder and a VAE are to them.

A configuration is what ComfyUI detects in a checkpoint of the family, with small numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

UNET = {
    "image_size": 32, "use_checkpoint": False, "in_channels": 4, "out_channels": 4, "legacy": False,
    "use_spatial_transformer": True, "model_channels": 32, "context_dim": 16, "channel_mult": [1, 2],
    "num_res_blocks": [1, 1], "use_temporal_resblock": False, "use_temporal_attention": False,
}  # fmt: skip
SD15 = {
    **UNET, "num_heads": 2, "num_head_channels": -1, "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1], "use_linear_in_transformer": False, "adm_in_channels": None,
}  # fmt: skip
SD21 = SD15 | {"num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True}
SDXL = {
    **UNET, "num_heads": -1, "num_head_channels": 16, "transformer_depth": [0, 2], "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 2, 2], "use_linear_in_transformer": True, "adm_in_channels": 2816,
    "num_classes": "sequential",
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 32,
    "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = FLUX | {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "mlp_ratio": 3.0,
    "axes_dim": [8, 8, 8, 8], "theta": 2000, "patch_size": 1, "qkv_bias": False, "global_modulation": True,
    "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}  # fmt: skip
CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64, "hidden_dim": 32,
    "n_layers": 2, "vec_in_dim": None, "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "txt_ids_dims": [],
}  # fmt: skip
RADIANCE = CHROMA | {
    "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2, "nerf_depth": 2, "nerf_max_freqs": 4, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": True, "use_sequential_txt_ids": False,
}  # fmt: skip
PIXART = {
    "image_model": "pixart_sigma", "num_heads": 2, "patch_size": 2, "hidden_size": 32, "in_channels": 4, "depth": 2,
    "model_max_length": 12, "pe_interpolation": 2, "input_size": 16, "micro_condition": False, "caption_channels": 24,
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 32, "n_layers": 2,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0, "multiple_of": 16,
}  # fmt: skip
ZIMAGE = LUMINA | {
    "dim": 256, "axes_dims": [16, 24, 24], "n_kv_heads": 4, "rope_theta": 256.0, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
COSMOS = {
    "image_model": "cosmos", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "block_config": "FA-CA-MLP",
    "concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 16,
    "num_blocks": 2, "num_heads": 2, "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable", "crossattn_emb_channels": 32,
}  # fmt: skip
PREDICT2 = {
    "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True,
    "crossattn_emb_channels": 32, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
    "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": 2,
    "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "out_dim": 16, "in_dim": 16, "num_heads": 2,
    "ffn_dim": 96, "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 32, "text_dim": 32, "window_size": (-1, -1),
    "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 24,
    "axes_dim": [8, 12, 12], "meanflow": False, "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True, "byt5": False,
    "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
KANDINSKY = {
    "image_model": "kandinsky5", "in_text_dim": 32, "in_text_dim2": 24, "time_dim": 32, "model_dim": 64, "ff_dim": 96,
    "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12), "visual_embed_dim": 132,
}  # fmt: skip
OMNIGEN = {
    "image_model": "omnigen2", "axes_dim_rope": [8, 8, 8], "axes_lens": [128, 128, 128], "ffn_dim_multiplier": None,
    "hidden_size": 96, "in_channels": 16, "multiple_of": 16, "norm_eps": 1e-5, "num_attention_heads": 4,
    "num_kv_heads": 2, "num_layers": 2, "num_refiner_layers": 1, "out_channels": None, "patch_size": 2,
    "text_feat_dim": 32, "timestep_scale": 1000.0,
}  # fmt: skip


SPREAD_OF_SD21_V = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def masked(tokens: int, draw: torch.Generator) -> dict:
    """What encoders add whose prompts are padded to one length, here by one token."""
    mask = torch.ones(1, tokens, dtype=torch.long)
    mask[:, -1] = 0 if tokens > 1 else 1
    return {"attention_mask": mask}


def unmasked(tokens: int, draw: torch.Generator) -> dict:
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}


def of_hunyuan_dit(tokens: int, draw: torch.Generator) -> dict:
    return {
        "attention_mask": torch.ones(1, tokens),
        "conditioning_mt5xl": torch.randn(1, 8, 16, generator=draw),
        "attention_mask_mt5xl": torch.ones(1, 8),
    }


def of_hidream(tokens: int, draw: torch.Generator) -> dict:
    return {"conditioning_llama3": torch.randn(1, 2, tokens, 32, generator=draw)}


def of_hidream_o1(tokens: int, draw: torch.Generator) -> dict:
    words = torch.randint(0, 64, (1, tokens), generator=draw)
    return {"text_input_ids": torch.cat([words, torch.tensor([[151669, 151673]])], 1)}  # begin of picture, time


def of_anima(tokens: int, draw: torch.Generator) -> dict:
    return {"t5xxl_ids": torch.randint(0, 32, (tokens,), generator=draw), "t5xxl_weights": torch.ones(tokens)}


def of_hunyuan_image(tokens: int, draw: torch.Generator) -> dict:
    return {"conditioning_byt5small": torch.randn(1, 3, 1472, generator=draw)}


@dataclass(frozen=True)
class Tiny:
    """A small model, and what its text encoder and its VAE give."""

    kind: str  # class in comfy.supported_models
    config: dict
    channels: int  # of latents
    width: int  # of the text encoding
    pooled: int | None = None
    rest: Callable[[int, torch.Generator], dict] | None = None  # what else the text encoder says of so many tokens
    pixels: int = 8  # a side of a latent pixel
    size: tuple[int, int] = (8, 12)  # of latents, for tests
    tokens: int | None = None  # of every prompt; None = its words
    state: dict[str, Tensor] = field(default_factory=dict)  # entries of a checkpoint by which ComfyUI knows it


TINY = {
    "sd15": Tiny("SD15", SD15, 4, 16),
    "sd21": Tiny("SD20", SD21, 4, 16),
    "sd21-v": Tiny("SD20", SD21, 4, 16, state={SPREAD_OF_SD21_V: torch.arange(9.0)}),
    "sdxl": Tiny("SDXL", SDXL, 4, 16, 1280),
    "sdxl-v": Tiny("SDXL", SDXL, 4, 16, 1280, state={"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}),
    "sdxl-edm": Tiny("SDXL", SDXL, 4, 16, 1280, state={"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}),
    "sdxl-refiner": Tiny("SDXLRefiner", SDXL | {"adm_in_channels": 2560}, 4, 16, 1280),
    "ssd1b": Tiny("SSD1B", SDXL | {"transformer_depth_middle": 0}, 4, 16, 1280),
    "sd3": Tiny(
        "SD3",
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None,
            "adm_in_channels": 24, "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128},
            },
            "num_patches": 6400, "pos_embed_max_size": 80, "pos_embed_scaling_factor": None,
        },
        16, 32, 24,
    ),
    "sd35-medium": Tiny(
        "SD3",
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "qk_norm": "rms",
            "adm_in_channels": 24, "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128},
            },
            "num_patches": 6400, "pos_embed_max_size": 80, "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [0],
        },
        16, 32, 24,
    ),
    "flux": Tiny("Flux", FLUX, 16, 32, 24),
    "flux-schnell": Tiny("FluxSchnell", FLUX | {"guidance_embed": False}, 16, 32, 24),
    "flux2": Tiny("Flux2", FLUX2, 128, 32, pixels=16),
    "chroma": Tiny("Chroma", CHROMA, 16, 32),
    "chroma-radiance": Tiny("ChromaRadiance", RADIANCE, 3, 32, pixels=1, size=(48, 64)),
    "pixart-alpha": Tiny(
        "PixArtAlpha", PIXART | {"image_model": "pixart_alpha", "micro_condition": True, "hidden_size": 48}, 4, 24,
        size=(48, 64),
    ),
    "pixart": Tiny("PixArtSigma", PIXART, 4, 24, size=(48, 64)),
    "lumina2": Tiny("Lumina2", LUMINA, 16, 32, rest=masked),
    "z-image": Tiny("ZImage", ZIMAGE, 16, 32, rest=unmasked),
    "z-image-pixel": Tiny(
        "ZImagePixelSpace",
        ZIMAGE | {
            "image_model": "zimage_pixel", "patch_size": 16, "in_channels": 3, "decoder_in_channels": 768,
            "decoder_hidden_size": 32, "decoder_num_res_blocks": 2, "decoder_max_freqs": 4, "use_x0": True,
        },
        3, 32, rest=unmasked, pixels=1, size=(48, 64),
    ),
    # A picture is a film of one frame here.
    "qwen": Tiny(
        "QwenImage",
        {
            "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2,
            "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        16, 32,
    ),
    "auraflow": Tiny(
        "AuraFlow",
        {
            "max_seq": 256, "cond_seq_dim": 32, "n_double_layers": 1, "n_layers": 3, "dim": 64, "n_heads": 2,
            "global_conddim": 64,
        },
        4, 32,
    ),
    "hidream": Tiny(
        "HiDream",
        {
            "image_model": "hidream", "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12],
            "caption_channels": [32, 32], "max_resolution": [64, 64], "in_channels": 16, "llama_layers": [0, 1],
            "num_attention_heads": 2, "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 1,
            "num_single_layers": 1, "out_channels": 16, "patch_size": 2, "text_emb_dim": 24,
        },
        16, 32, 24, of_hidream,
    ),
    "hidream-o1": Tiny(
        "HiDreamO1",
        {
            "image_model": "hidream_o1",
            "text_config_overrides": {
                "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 32, "rope_dims": [4, 6, 6],
            },
            "vision_config_overrides": {
                "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "depth": 1, "deepstack_visual_indexes": [],
            },
        },
        3, 16, rest=of_hidream_o1, pixels=1, size=(64, 96),
    ),
    "hunyuan-dit": Tiny(
        "HunyuanDiT",
        {
            "image_model": "hydit", "depth": 4, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0,
            "text_states_dim": 16, "text_states_dim_t5": 16, "text_len": 77, "text_len_t5": 8,
        },
        4, 16, rest=of_hunyuan_dit, tokens=77,
    ),
    "hunyuan-dit1": Tiny(
        "HunyuanDiT1",
        {
            "image_model": "hydit1", "depth": 4, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0,
            "text_states_dim": 16, "text_states_dim_t5": 16, "text_len": 77, "text_len_t5": 8, "size_cond": True,
            "use_style_cond": True,
        },
        4, 16, rest=of_hunyuan_dit, tokens=77,
    ),
    "cosmos": Tiny("CosmosT2V", COSMOS, 16, 32, rest=unmasked),
    "cosmos-predict2": Tiny("CosmosT2IPredict2", PREDICT2, 16, 32),
    "anima": Tiny("Anima", PREDICT2 | {"image_model": "anima"}, 16, 32, rest=of_anima),
    "omnigen2": Tiny("Omnigen2", OMNIGEN, 16, 32, rest=unmasked),
    "boogu": Tiny(
        "Boogu",
        {
            "image_model": "boogu", "axes_dim_rope": [8, 8, 8], "axes_lens": [128, 128, 128], "hidden_size": 96,
            "multiple_of": 16, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 2, "num_refiner_layers": 1,
            "num_double_stream_layers": 1, "instruction_feat_dim": 32,
        },
        16, 32, rest=unmasked,
    ),
    "krea2": Tiny(
        "Krea2",
        {
            "image_model": "krea2", "features": 64, "channels": 16, "patch": 2, "layers": 2, "heads": 2, "kvheads": 1,
            "txtlayers": 2, "txtdim": 32, "txtheads": 2, "txtkvheads": 2, "tdim": 32, "multiplier": 2,
        },
        16, 64,
    ),
    "longcat-image": Tiny(
        "LongCatImage", FLUX | {"vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": [1, 2]}, 16, 32
    ),
    "kandinsky5-image": Tiny("Kandinsky5Image", KANDINSKY | {"visual_embed_dim": 64}, 16, 32, 24),
    "hunyuan-image21": Tiny(
        "HunyuanImage21",
        HUNYUAN | {
            "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "vec_in_dim": None, "axes_dim": [16, 16],
            "byt5": True, "meanflow": True,
        },
        64, 32, rest=of_hunyuan_image, pixels=32,
    ),
    "ernie-image": Tiny(
        "ErnieImage",
        {
            "image_model": "ernie", "hidden_size": 64, "num_attention_heads": 2, "num_layers": 2,
            "ffn_hidden_size": 96, "text_in_dim": 32, "rope_axes_dim": (8, 12, 12),
        },
        128, 32, pixels=16,
    ),
    "ideogram4": Tiny(
        "Ideogram4",
        {
            "image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
            "attention_head_dim": 32, "intermediate_size": 96, "adaln_dim": 32, "llm_features_dim": 32,
            "mrope_section": (6, 5, 5),
        },
        128, 32, rest=unmasked, pixels=16,
    ),
    "lens": Tiny(
        "Lens",
        {
            "image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 2, "num_attention_heads": 2,
            "enc_hidden_dim": 16, "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1),
        },
        128, 32, rest=masked, pixels=16,
    ),
    "joyimage": Tiny(
        "JoyImage",
        {
            "image_model": "joyimage", "hidden_size": 64, "num_attention_heads": 2, "text_dim": 32, "num_layers": 2,
            "rope_dim_list": [8, 12, 12],
        },
        16, 32,
    ),
    "mage-flow": Tiny(
        "MageFlow",
        {
            "image_model": "mage_flow", "in_channels": 128, "num_layers": 2, "attention_head_dim": 32,
            "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (8, 12, 12),
        },
        128, 32, pixels=16,
    ),
    "pixeldit": Tiny(
        "PixelDiTT2I",
        {
            "image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 4,
            "pixel_attn_hidden_size": 64, "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 1,
            "txt_embed_dim": 32, "txt_max_length": 16,
        },
        3, 32, rest=masked, pixels=1, size=(48, 64),
    ),
    "wan21": Tiny("WAN21_T2V", WAN, 16, 32),
    "wan22": Tiny("WAN22_T2V", WAN | {"in_dim": 48, "out_dim": 48}, 48, 32, pixels=16),
    "hunyuan-video": Tiny("HunyuanVideo", HUNYUAN, 16, 32, 24),
    "hunyuan-video15": Tiny(
        "HunyuanVideo15",
        HUNYUAN | {
            "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "byt5": True,
            "guidance_embed": False, "use_cond_type_embedding": True, "vision_in_dim": 16, "meanflow_sum": True,
        },
        32, 32, 24, of_hunyuan_image, pixels=16,
    ),
    "ltxv": Tiny(
        "LTXV",
        {
            "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
            "cross_attention_dim": 64, "caption_channels": 32,
        },
        128, 32, rest=masked, pixels=32,
    ),
    "mochi": Tiny(
        "GenmoMochi",
        {
            "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64,
            "hidden_size_y": 32, "mlp_ratio_x": 192.0, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12,
            "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
            "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
            "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 32, "t5_token_length": 256, "rope_theta": 10000.0,
        },
        12, 32, rest=masked,
    ),
    "kandinsky5": Tiny("Kandinsky5", KANDINSKY, 16, 32, 24),
    "cogvideox": Tiny(
        "CogVideoX_T2V",
        {
            "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 32, "time_embed_dim": 32,
            "num_layers": 2, "in_channels": 16, "patch_size": 2, "text_embed_dim": 32,
            "use_learned_positional_embeddings": False, "use_rotary_positional_embeddings": True,
        },
        16, 32,
    ),
    "cogvideox15": Tiny(
        "CogVideoX_T2V",
        {
            "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 32, "time_embed_dim": 32,
            "num_layers": 2, "in_channels": 16, "patch_size": 2, "patch_size_t": 2, "text_embed_dim": 32,
            "use_learned_positional_embeddings": False, "use_rotary_positional_embeddings": True,
        },
        16, 32,
    ),
}  # fmt: skip
DETECTION_ONLY = ("use_temporal_attention", "attention_resolutions")


def is_known(family: str) -> bool:
    """Whether this ComfyUI has the family's class."""
    from comfy import supported_models

    return TINY[family].kind in vars(supported_models)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **sizes: object):
    """A ModelPatcher over a random model; no parameter is zero, for zeros would hide errors.

    ``sizes`` stand in for those of its configuration.
    """
    import comfy.model_patcher
    from comfy import supported_models

    tiny = replace(TINY[family], config=TINY[family].config | sizes)
    kind = getattr(supported_models, tiny.kind)
    if "chroma_radiance" in tiny.config.values():  # its parameters grew over the versions
        from comfy.ldm.chroma_radiance.model import ChromaRadianceParams as known

        tiny = replace(tiny, config={k: v for k, v in tiny.config.items() if k in known.__dataclass_fields__})
    detected = {key: value for key, value in kind.unet_config.items() if key not in DETECTION_ONLY}
    model_config = kind({**detected, **tiny.config, "dtype": dtype})
    model_config.unet_config |= tiny.config  # a class may state sizes of its own
    model_config.set_inference_dtype(dtype, None)
    model = model_config.get_model(dict(tiny.state), "", device=torch.device("cpu"))
    if family == "anima":  # whose own size no configuration states
        model.diffusion_model.llm_adapter = small_llm_adapter(dtype)
    randomise(model)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def small_llm_adapter(dtype: torch.dtype):
    import comfy.ops
    from comfy.ldm.anima.model import LLMAdapter

    return LLMAdapter(32, 32, 32, 1, 2, dtype=dtype, operations=comfy.ops.disable_weight_init)


@torch.no_grad()
def randomise(model) -> None:
    """Fills parameters so that every layer passes on about as much as it gets, and what steers is felt.

    Buffers of floats as well: SD3's table of positions is uninitialised memory.
    """
    draw = torch.Generator().manual_seed(1)
    for name, tensor in (*model.named_parameters(), *model.diffusion_model.named_buffers()):
        if tensor.is_floating_point():
            spread = 1 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1
            norm = tensor.ndim == 1 and name.endswith(("weight", "scale"))
            tensor.copy_(norm + spread * torch.randn(tensor.shape, generator=draw))
    model.requires_grad_(False)


def tiny_conditioning(family: str, tokens: int, seed: int = 0) -> list:
    """ComfyUI's conditioning list of one random prompt."""
    tiny, draw = TINY[family], torch.Generator().manual_seed(seed)
    tokens = tiny.tokens or tokens
    extra = {"pooled_output": torch.randn(1, tiny.pooled, generator=draw) if tiny.pooled else None}
    context = torch.randn(1, tokens, tiny.width, generator=draw)
    return [[context, extra | (tiny.rest(tokens, draw) if tiny.rest else {})]]


def a_few_weights():
    """Something for ComfyUI to load, whose numbers tell it from others."""
    import comfy.model_patcher

    layer = torch.nn.Linear(2, 2).requires_grad_(False)
    layer.load_state_dict({"weight": torch.eye(2), "bias": torch.ones(2)})
    return comfy.model_patcher.ModelPatcher(layer, torch.device("cpu"), torch.device("cpu"))


class TinyClip:
    """Answers a prompt with random tensors that depend on its text; its words are its tokens."""

    layer_idx = None

    def __init__(self, family: str) -> None:
        self.family = family
        self.patcher = a_few_weights()

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, show_pbar: bool = True) -> list:
        return tiny_conditioning(self.family, max(1, len(tokens.split())), sum(tokens.encode()))


class TinyVae:
    """A pixel of its latents is a mean of a square's colours, in every channel another mixture of them."""

    def __init__(self, family: str, film: bool) -> None:
        self.latent_channels, self._pixels, self._film = TINY[family].channels, TINY[family].pixels, film
        self.patcher = a_few_weights()
        self._mixture = torch.randn(self.latent_channels, 3, generator=torch.Generator().manual_seed(7))

    def spacial_compression_encode(self) -> int:
        return self._pixels

    def encode(self, images: Tensor) -> Tensor:
        """(1, h, w, 3) in [0, 1] to (1, c, h', w'), or (1, c, 1, h', w') of a film."""
        small = torch.nn.functional.avg_pool2d(2 * images.movedim(-1, 1) - 1, self._pixels)
        latents = torch.einsum("ck,bkhw->bchw", self._mixture, small)
        return latents[:, :, None] if self._film else latents

    def decode(self, latents: Tensor) -> Tensor:
        """The other way, to (b, h, w, 3), or (b, 1, h, w, 3) of a film."""
        small = torch.einsum("kc,bc...->bk...", torch.linalg.pinv(self._mixture), latents).movedim(1, -1) / 2 + 0.5
        return small.repeat_interleave(self._pixels, -3).repeat_interleave(self._pixels, -2)
