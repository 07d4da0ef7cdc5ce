"""Tiny random models of every family, saved as diffusers saves real ones, and a world without a network."""

import inspect
import json
import re
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLIP_END = 2 * len(LETTERS) + 1


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the network fails the test."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"something tried to open a connection: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_folder(family) is a diffusers folder, which tests only read."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str) -> Path:
        if family not in made:
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what diffusers says while it builds is not ours to test
                torch.manual_seed(0)
                MAKERS[family](root).save_pretrained(root / family)
            made[family] = root / family
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tiny_file(tiny_folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_file(family) is the same model in one file, with the names that its makers gave it."""
    root, made = tmp_path_factory.mktemp("files"), {}

    def file(family: str) -> Path:
        if family not in made:
            made[family] = root / f"{family}.safetensors"
            state = {key: value.contiguous() for key, value in SINGLE_FILES[family](tiny_folder(family)).items()}
            save_file(state, made[family])
        return made[family]

    return file


@dataclass(frozen=True)
class Call:
    """One call of a network: its arguments by name, and what it returned."""

    arguments: dict[str, Any]
    output: torch.Tensor


@pytest.fixture(scope="session")
def pipeline_calls(tiny_folder) -> Callable[..., list[Call]]:
    """pipeline_calls(family, prompt, …) runs diffusers' own pipeline, and gives the calls of its network."""
    from diffusers import DiffusionPipeline

    def run(family: str, prompt: str, **options: Any) -> list[Call]:
        calls: list[Call] = []

        def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            calls.append(Call(dict(bound), output[0]))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = DiffusionPipeline.from_pretrained(tiny_folder(family), local_files_only=True)
            pipeline.set_progress_bar_config(disable=True)
            network = pipeline.components.get("unet") or pipeline.components["transformer"]
            network.register_forward_hook(record, with_kwargs=True)
            noise = torch.Generator().manual_seed(0)
            pipeline(prompt, num_inference_steps=2, output_type="latent", generator=noise, **options)
        return calls

    return run


def clip_tokenizer(root: Path) -> Any:
    """Spells words letter by letter."""
    from transformers import CLIPTokenizer

    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=77)


def t5_tokenizer(_: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512, **names)


def clip(width: int, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=CLIP_END + 1,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        eos_token_id=CLIP_END,
        bos_token_id=CLIP_END - 1,
        pad_token_id=CLIP_END,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 32, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    return T5EncoderModel(T5Config(vocab_size=4 + len(LETTERS), **sizes)).eval()


def vae(**options: float) -> Any:
    """Two pixels to a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=32,
        **options,
    )


def unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )


def stable_diffusion_scheduler(**options: Any) -> Any:
    from diffusers import DDIMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options)


def flux(root: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=1,
        attention_head_dim=128,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae(scaling_factor=0.3611, shift_factor=0.1159),
        clip(16),
        clip_tokenizer(root),
        t5(),
        t5_tokenizer(root),
        transformer,
    )


def schnell(root: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    pipeline = flux(root)
    config = {**pipeline.transformer.config, "guidance_embeds": False}
    pipeline.register_modules(
        transformer=FluxTransformer2DModel.from_config(config), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    return pipeline


def sd3(root: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(scaling_factor=1.5305, shift_factor=0.0609),
        clip(8, projected=True),
        clip_tokenizer(root),
        clip(16, projected=True),
        clip_tokenizer(root),
        t5(),
        t5_tokenizer(root),
    )


def sdxl(root: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae(scaling_factor=0.13025),
        clip(16),
        clip(16, projected=True),
        clip_tokenizer(root),
        clip_tokenizer(root),
        unet(
            cross_attention_dim=32,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        stable_diffusion_scheduler(),
        add_watermarker=False,
    )


def sd15(root: Path, **scheduler: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae(scaling_factor=0.18215),
        clip(16),
        clip_tokenizer(root),
        unet(cross_attention_dim=16),
        stable_diffusion_scheduler(**scheduler),
        None,
        None,
        requires_safety_checker=False,
    )


def sd2_v(root: Path) -> Any:
    return sd15(root, prediction_type="v_prediction", rescale_betas_zero_snr=True)


def pixart(root: Path, *, size_conditions: bool = True) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=128,  # the pipeline tells the picture's size to models with this number only
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        use_additional_conditions=size_conditions,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    return PixArtAlphaPipeline(t5_tokenizer(root), t5(), vae(scaling_factor=0.18215), transformer, scheduler)


def pixart_sigma(root: Path) -> Any:
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline(**pixart(root, size_conditions=False).components)


MAKERS = {
    "flux": flux,
    "schnell": schnell,
    "sd3": sd3,
    "sdxl": sdxl,
    "sd15": sd15,
    "sd2_v": sd2_v,
    "pixart": pixart,
    "pixart_sigma": pixart_sigma,
}


# ---------------------------------------------------------------------------------------------------------------------
# The same weights in the names of the original repositories


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
