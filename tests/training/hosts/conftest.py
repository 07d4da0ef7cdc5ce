"""Tiny random models of every family, saved as diffusers saves real ones, and a world without a network."""

import importlib.util
import inspect
import json
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

# The file beside this one, importable without a folder on sys.path.
spec = importlib.util.spec_from_file_location("original_names", Path(__file__).with_name("original_names.py"))
original_names = sys.modules["original_names"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(original_names)

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
            state = {
                key: value.contiguous()
                for key, value in original_names.SINGLE_FILES[family](tiny_folder(family)).items()
            }
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
