"""Tiny random models of every family, made by ComfyUI's own classes, and an embedded model of random weights."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# Importable without a folder on sys.path.
spec = importlib.util.spec_from_file_location("stored_models", Path(__file__).with_name("stored_models.py"))
sys.modules["stored_models"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["stored_models"])

# (class in comfy.supported_models, configuration, latent channels, context width, pooled width or None)
TINY = {
    "sd15": (
        "SD15",
        {
            "image_size": 32, "use_checkpoint": False, "in_channels": 4, "out_channels": 4, "legacy": False,
            "use_spatial_transformer": True, "model_channels": 32, "num_heads": 2, "num_head_channels": -1,
            "context_dim": 16, "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
            "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1],
            "use_linear_in_transformer": False, "use_temporal_resblock": False, "use_temporal_attention": False,
            "adm_in_channels": None,
        },
        4, 16, None,
    ),
    "sdxl": (
        "SDXL",
        {
            "image_size": 32, "use_checkpoint": False, "in_channels": 4, "out_channels": 4, "legacy": False,
            "use_spatial_transformer": True, "model_channels": 32, "num_heads": -1, "num_head_channels": 16,
            "context_dim": 16, "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [0, 2],
            "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2],
            "use_linear_in_transformer": True, "use_temporal_resblock": False, "use_temporal_attention": False,
            "adm_in_channels": 2816, "num_classes": "sequential",
        },
        4, 16, 1280,
    ),
    "flux": (
        "Flux",
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 32,
            "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
            "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
            "txt_ids_dims": [],
        },
        16, 32, 24,
    ),
    "sd3": (
        "SD3",
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None,
            "adm_in_channels": 24, "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128},
            },
            "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
        },
        16, 32, 24,
    ),
    "pixart": (
        "PixArtSigma",
        {
            "image_model": "pixart_sigma", "num_heads": 2, "patch_size": 2, "hidden_size": 32, "in_channels": 4,
            "depth": 2, "model_max_length": 12, "pe_interpolation": 2, "input_size": 16, "micro_condition": False,
            "caption_channels": 24,
        },
        4, 24, None,
    ),
    # A picture is a film of one frame here, and the family has no presets of ours.
    "qwen": (
        "QwenImage",
        {
            "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2,
            "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        16, 32, None,
    ),
}  # fmt: skip
DETECTION_ONLY = ("use_temporal_attention", "attention_resolutions")


def tiny_model(family: str, dtype: torch.dtype = torch.float32):
    """A ModelPatcher over a random model; no parameter is zero, for zeros would hide errors."""
    import comfy.model_patcher
    from comfy import supported_models

    name, config, *_ = TINY[family]
    kind = getattr(supported_models, name)
    detected = {key: value for key, value in kind.unet_config.items() if key not in DETECTION_ONLY}
    model_config = kind({**detected, **config, "dtype": dtype})
    model_config.set_inference_dtype(dtype, None)
    model = model_config.get_model({}, "", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Buffers too: SD3's table of positions is uninitialised memory.
        for tensor in (*model.parameters(), *model.diffusion_model.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    model.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def tiny_conditioning(family: str, tokens: int, seed: int = 0) -> list:
    """ComfyUI's conditioning list of one random prompt."""
    *_, width, pooled = TINY[family]
    generator = torch.Generator().manual_seed(seed)
    extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
    return [[torch.randn(1, tokens, width, generator=generator), extra]]


class TinyClip:
    """Answers a prompt with random tensors that depend on its text; its words are its tokens."""

    layer_idx = None

    def __init__(self, family: str) -> None:
        self.family = family
        self.patcher = tiny_model("flux")  # whose weights tell it from others

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, show_pbar: bool = True) -> list:
        return tiny_conditioning(self.family, max(1, len(tokens.split())), sum(tokens.encode()))


@pytest.fixture
def tiny():
    """``tiny("flux")`` makes a loaded-like MODEL."""
    return tiny_model


@pytest.fixture
def tiny_clip():
    """``tiny_clip("flux")`` makes what a CLIP is to a prompt table."""
    return TinyClip


@pytest.fixture
def tiny_prompt():
    """``tiny_prompt("flux", tokens, seed)`` makes a CONDITIONING."""
    return tiny_conditioning


@pytest.fixture
def latent_channels():
    return {family: row[2] for family, row in TINY.items()}


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> Path:
    """Files like the shipped ones, of random weights."""
    from safetensors.torch import save_file

    from stylewright.training.embedded.autoencoder import new_autoencoder, save_autoencoder
    from stylewright.training.embedded.text import TextEncoder
    from stylewright.training.embedded.transformer import new_transformer, save_transformer

    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(11)
        transformer, autoencoder, encoder = new_transformer(), new_autoencoder(), TextEncoder()
    save_transformer(folder / "transformer.safetensors", transformer)
    save_autoencoder(folder / "autoencoder.safetensors", autoencoder)
    save_file(encoder.state_dict(), folder / "text_encoder.safetensors")
    return folder


@pytest.fixture
def embedded(random_weights):
    """MODEL, CLIP and VAE of the random weights, loaded as a node loads them."""
    from stylewright.nodes.bridge.embedded import load_embedded
    from stylewright.training.embedded.weights import Weights

    with torch.inference_mode():
        return load_embedded(Weights(random_weights))
