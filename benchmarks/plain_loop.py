"""A plain diffusers + peft loop for training_step.py, like those of diffusers' own LoRA scripts, without accelerate."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from models import KINDS, model_of
from torch import Tensor

if TYPE_CHECKING:
    from contenders import Task, Training

LEARNING_RATE = 1e-4
# The linear layers inside the blocks but those for modulation: what our preset "all" adapts.
_JOINT = (
    r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2"
)
TARGETS = {
    "flux": rf"(single_)?transformer_blocks\.\d+\.({_JOINT}|proj_mlp|proj_out)",
    "sd3": rf"transformer_blocks\.\d+\.({_JOINT})",
    "sdxl": r".*\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.0\.proj|ff\.net\.2))",
}

# (x0, eps) -> noisy latents, timesteps, what is to be predicted
Noising = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# (noisy latents, timesteps) -> prediction
Prediction = Callable[[Tensor, Tensor], Tensor]


def diffusers_peft(task: "Task") -> "Training":
    """Forward, loss, backward, clipping and AdamW."""
    from peft import LoraConfig

    model = model_of(KINDS[task.model], task.device, torch.float32)
    latents, context, pooled = (tensor.to(task.device) for tensor in task.inputs)
    predict = PREDICTIONS[task.model](model, latents, context, pooled)
    noised = discrete() if task.model == "sdxl" else flow()

    def train(steps: int) -> float:
        config = LoraConfig(
            r=task.rank, lora_alpha=task.rank, init_lora_weights="gaussian", target_modules=TARGETS[task.model]
        )
        model.add_adapter(config)
        if task.checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        for _ in range(steps):
            x_t, timesteps, wanted = noised(latents, torch.randn_like(latents))
            losses = ((predict(x_t, timesteps).float() - wanted.float()) ** 2).reshape(len(wanted), -1)
            loss = losses.mean(1).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            shown = loss.detach().item()
        model.delete_adapters("default")
        return shown

    return train


# --------------------------------------------------------------------------------------------------------------------
# Noise


def flow() -> Noising:
    """FLUX and SD3: logit-normal time on a shifted schedule."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def noised(x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        density = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0, 1.29)
        indices = (density * scheduler.config.num_train_timesteps).long()
        timesteps = scheduler.timesteps[indices].to(x0.device)
        sigmas = scheduler.sigmas[indices].to(x0.device).view(-1, 1, 1, 1)
        return (1.0 - sigmas) * x0 + sigmas * eps, timesteps, eps - x0

    return noised


def discrete() -> Noising:
    """SDXL: one of a thousand timesteps."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def noised(x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        return scheduler.add_noise(x0, eps, timesteps), timesteps, eps

    return noised


# --------------------------------------------------------------------------------------------------------------------
# The models' own calls


def of_flux(model: Any, latents: Tensor, context: Tensor, pooled: Tensor) -> Prediction:
    from diffusers import FluxPipeline

    height, width = latents.shape[-2:]
    text_ids = torch.zeros(context.shape[1], 3, device=latents.device)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, latents.device, torch.float32)

    def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
        prediction = model(
            hidden_states=FluxPipeline._pack_latents(x_t, *x_t.shape),
            timestep=timesteps / 1000,
            pooled_projections=pooled,
            encoder_hidden_states=context,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(prediction, height * 8, width * 8, 8)

    return predict


def of_sd3(model: Any, latents: Tensor, context: Tensor, pooled: Tensor) -> Prediction:
    return lambda x_t, timesteps: model(x_t, context, pooled, timesteps, return_dict=False)[0]


def of_sdxl(model: Any, latents: Tensor, context: Tensor, pooled: Tensor) -> Prediction:
    height, width = (8 * side for side in latents.shape[-2:])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=latents.device).expand(len(latents), -1)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return lambda x_t, timesteps: model(x_t, timesteps, context, added_cond_kwargs=added, return_dict=False)[0]


PREDICTIONS = {"flux": of_flux, "sd3": of_sd3, "sdxl": of_sdxl}
