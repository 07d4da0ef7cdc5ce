"""The contenders of training_step.py: each trains one adapter on the same small FLUX for a number of steps.

A contender is a function of the task. It builds its model and returns a function ``train(steps)`` that runs that
many optimizer steps with everything that belongs to them; whoever calls it watches the optimizer.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN, HEADS, DOUBLE_BLOCKS, SINGLE_BLOCKS = 384, 3, 2, 4
CONTEXT_WIDTH, POOLED_WIDTH, TEXT_TOKENS = 256, 128, 64
LATENT = (16, 32, 32)  # 256 image tokens
LEARNING_RATE = 1e-4
# The linear layers inside the blocks but those for modulation: in diffusers' layout 44, in the fused one 24.
DIFFUSERS_TARGETS = (
    r"(single_)?transformer_blocks\.\d+\."
    r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp|proj_out)"
)

Training = Callable[[int], object]


@dataclass(frozen=True)
class Task:
    """What all do alike. The adapter's alpha is its rank, and its arithmetic is float32."""

    batch_size: int = 1
    rank: int = 8
    checkpointing: bool = False  # recompute every block; the native node recomputes in any case
    device: str = "cpu"

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (b, 16, 32, 32), context (b, n, d) and pooled vector (b, d), the same in every process."""
        source = torch.Generator().manual_seed(0)
        shapes = LATENT, (TEXT_TOKENS, CONTEXT_WIDTH), (POOLED_WIDTH,)
        return tuple(torch.randn(self.batch_size, *shape, generator=source) for shape in shapes)


# --------------------------------------------------------------------------------------------------------------------
# diffusers' layout: q, k, v and the MLP's first layer apart


def diffusers_flux(task: Task) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT[0],
            num_layers=DOUBLE_BLOCKS,
            num_single_layers=SINGLE_BLOCKS,
            attention_head_dim=HIDDEN // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=CONTEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
        )
    return transformer.requires_grad_(False).to(task.device)


def diffusers_peft(task: Task) -> Training:
    """A plain loop like that of diffusers' own FLUX LoRA script, without accelerate."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
    from peft import LoraConfig

    transformer = diffusers_flux(task)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, context, pooled = (tensor.to(task.device) for tensor in task.inputs)
    text_ids = torch.zeros(TEXT_TOKENS, 3, device=task.device)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, LATENT[1] // 2, LATENT[2] // 2, task.device, torch.float32)

    def noisy(x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        density = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0, 1.29)
        indices = (density * scheduler.config.num_train_timesteps).long()
        timesteps = scheduler.timesteps[indices].to(x0.device)
        sigmas = scheduler.sigmas[indices].to(x0.device).view(-1, 1, 1, 1)
        return (1.0 - sigmas) * x0 + sigmas * eps, timesteps, sigmas

    def train(steps: int) -> float:
        transformer.add_adapter(
            LoraConfig(
                r=task.rank,
                lora_alpha=task.rank,
                init_lora_weights="gaussian",
                target_modules=DIFFUSERS_TARGETS,
            )
        )
        if task.checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        for _ in range(steps):
            eps = torch.randn_like(latents)
            x_t, timesteps, sigmas = noisy(latents, eps)
            packed = FluxPipeline._pack_latents(x_t, *x_t.shape)
            prediction = transformer(
                hidden_states=packed,
                timestep=timesteps / 1000,
                pooled_projections=pooled,
                encoder_hidden_states=context,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
            prediction = FluxPipeline._unpack_latents(prediction, LATENT[1] * 8, LATENT[2] * 8, 8)
            weighting = compute_loss_weighting_for_sd3("none", sigmas)
            losses = (weighting.float() * (prediction.float() - (eps - latents).float()) ** 2).reshape(len(eps), -1)
            loss = losses.mean(1).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            shown = loss.detach().item()
        transformer.delete_adapters("default")
        return shown

    return train


def stylewright(task: Task) -> Training:
    """Our loop on diffusers' model, as ``stylewright train`` runs it."""
    from stylewright.training.hosts.flux import FluxDenoiser

    denoiser = FluxDenoiser(diffusers_flux(task))
    latents, context, pooled = task.inputs
    rows = [{"context": context[i : i + 1], "pooled": pooled[i : i + 1]} for i in range(task.batch_size)]
    return lambda steps: _our_loop(task, steps, denoiser, latents, rows)


def _our_loop(task: Task, steps: int, denoiser: Any, latents: Tensor, rows: list[dict[str, Tensor]]) -> object:
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.data.dataset import Dataset, Example
    from stylewright.training.loops.config import TrainConfig
    from stylewright.training.loops.train import train

    examples = [Example(str(i), latents[i], row, None, "a picture") for i, row in enumerate(rows)]
    config = TrainConfig(
        steps=steps,
        batch_size=task.batch_size,
        accumulation=1,
        learning_rate=LEARNING_RATE,
        optimizer="adamw",
        gradient_checkpointing=task.checkpointing,
        adapter=AdapterConfig(rank=task.rank, targets="all"),
    )
    return train(
        denoiser, Dataset(examples, rows[0]), config, run_dir=None, report=lambda event: None, device=task.device
    )


# --------------------------------------------------------------------------------------------------------------------
# The original layout, ComfyUI's: q, k, v and the MLP's first layer in one


def comfyui_flux(task: Task) -> Any:
    """A ModelPatcher with its model loaded, made in inference mode as a loader node does."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = {
        "image_model": "flux",
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "vec_in_dim": POOLED_WIDTH,
        "context_in_dim": CONTEXT_WIDTH,
        "hidden_size": HIDDEN,
        "mlp_ratio": 4.0,
        "num_heads": HEADS,
        "depth": DOUBLE_BLOCKS,
        "depth_single_blocks": SINGLE_BLOCKS,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": False,
        "txt_ids_dims": [],
    }
    with torch.inference_mode():
        model_config = comfy.supported_models.Flux({**config, "dtype": torch.float32})
        model_config.set_inference_dtype(torch.float32, None)
        model = model_config.get_model({}, "", device=torch.device("cpu"))
        source = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.02)
        load_device = comfy.model_management.get_torch_device()
        patcher = comfy.model_patcher.ModelPatcher(model, load_device, torch.device("cpu"))
        comfy.model_management.load_models_gpu([patcher])
        return patcher


def comfyui_native(task: Task) -> Training:
    """ComfyUI's TrainLoraNode with its defaults, as far as they are not the task's.

    It adapts every layer, has no choice of it, and cannot train FLUX without recomputing: the blocks add in place.
    By default it recomputes the whole model at once; with the task's checkpointing, every block.
    """
    import nodes  # noqa: F401  ComfyUI's, which its extras expect to be loaded
    from comfy_extras.nodes_train import TrainLoraNode

    model = comfyui_flux(task)
    model.cached_patcher_init = (_second_model, (task,))
    latents, context, pooled = task.inputs
    positive = [[context[i : i + 1], {"pooled_output": pooled[i : i + 1]}] for i in range(task.batch_size)]

    def train(steps: int) -> object:
        with torch.inference_mode():  # as the executor runs every node
            return TrainLoraNode.execute(
                model=[model],
                latents=[{"samples": latents}],
                positive=[positive],
                batch_size=[task.batch_size],
                steps=[steps],
                grad_accumulation_steps=[1],
                learning_rate=[LEARNING_RATE],
                rank=[task.rank],
                optimizer=["AdamW"],
                loss_function=["MSE"],
                seed=[0],
                training_dtype=["fp32"],
                lora_dtype=["fp32"],
                quantized_backward=[False],
                algorithm=["LoRA"],
                gradient_checkpointing=[True],
                checkpoint_depth=[2 if task.checkpointing else 1],
                offloading=[False],
                existing_lora=["[None]"],
                bucket_mode=[False],
                bypass_mode=[False],
            )

    return train


def _second_model(task: Task, disable_dynamic: bool = False) -> Any:
    """The copy that the node trains on, which is not counted: it is the model, and no cost of a step."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return comfyui_flux(task)


def stylewright_comfyui(task: Task) -> Training:
    """Our loop on ComfyUI's model, through the bridge that the trainer node uses."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session

    model = comfyui_flux(task)
    latents, context, pooled = task.inputs
    prompts = PromptTable(_Encoder(context, pooled))

    def train(steps: int) -> object:
        with torch.inference_mode(), training_session(model):
            rows = [prompts.encode([str(i)]) for i in range(task.batch_size)]
            return _our_loop(task, steps, ComfyDenoiser(model, prompts), latents, rows)

    return train


class _Encoder:
    """Stands for a CLIP: the prompt "0" means the first row, and so on."""

    def __init__(self, context: Tensor, pooled: Tensor) -> None:
        self._context, self._pooled = context, pooled

    def tokenize(self, text: str) -> int:
        return int(text)

    def encode_from_tokens_scheduled(self, row: int, show_pbar: bool = True) -> list:
        return [[self._context[row : row + 1], {"pooled_output": self._pooled[row : row + 1]}]]


@dataclass(frozen=True)
class Contender:
    build: Callable[[Task], Training]
    in_comfyui: bool


CONTENDERS = {
    "stylewright": Contender(stylewright, in_comfyui=False),
    "diffusers-peft": Contender(diffusers_peft, in_comfyui=False),
    "stylewright-comfyui": Contender(stylewright_comfyui, in_comfyui=True),
    "comfyui-native": Contender(comfyui_native, in_comfyui=True),
}


def open_contender(name: str, task: Task) -> Training:
    """Builds a contender in this process."""
    from comfyui import open_comfyui
    from package import load_package

    logging.disable(logging.WARNING)
    contender = CONTENDERS[name]
    if contender.in_comfyui:
        open_comfyui(Path(tempfile.mkdtemp(prefix="stylewright-benchmark-")), task.device)
        import comfy.utils

        comfy.utils.PROGRESS_BAR_ENABLED = False
    load_package()
    return contender.build(task)
