"""A SAMPLER for generators of one step or a few, which is right at every time, and drawing with it.

KSAMPLER begins with ``noise_scaling(sigmas[0], noise, latent, max_denoise)``, which makes unit noise of an empty latent
only where sigma is the model's largest. At a time before the last it feeds sigma * noise: for DMD2's 399 on SDXL that
has a standard deviation of 0.76, and what is drawn is wrong. Here the first input is made in the model's own
coordinates (:mod:`...training.one_step`) and only then turned into ComfyUI's x.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.k_diffusion.sampling import trange
from torch import Tensor

from ...training.one_step import FRESH, UNIT, Answer, first_input, generate, inpainting
from .noise_levels import NoiseLevels
from .one_step_levels import check_sigmas, levels_to_draw
from .sound import check_sound, misfit


class OneStep(comfy.samplers.Sampler):
    """One evaluation of the model for each sigma but the last, which is 0.

    An empty latent is drawn from unit noise. A given one is noised to the first sigma as the model's process does,
    alpha * latent + sigma * noise. Where there is a mask, what is drawn begins as if the latent were empty (``anew``)
    or from the latent, too; the rest is kept, and shown to the model noised.
    """

    def __init__(self, *, between: str = FRESH, start: str = UNIT, anew: bool = True) -> None:
        """``between`` and ``start`` as in :mod:`...training.one_step`."""
        self.between, self.start, self.anew = between, start, anew

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """The latents x0 (b, c, …) in the model's scale. ValueError for sigmas or a latent that cannot be drawn."""
        sampling = model_wrap.inner_model.model_sampling
        levels = levels_to_draw(sampling)
        check_sigmas(sampling, levels, sigmas)
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        given = given_of(latent, levels)
        if not torch.count_nonzero(noise):
            raise ValueError(
                "the noise is empty (DisableNoise): this sampler makes its first input from noise. Link one"
            )
        log_snrs, steps = levels.log_snr(sigmas[:-1]), len(sigmas) - 1
        extra_args["denoise_mask"] = denoise_mask
        answer = masked_answer(model_wrap, levels, sigmas, latent, noise, extra_args)
        begin = None if denoise_mask is not None and self.anew else given
        first = first_input(levels.process, noise, log_snrs[:1].expand(len(noise)), begin, self.start)

        def after(step: int, x_t: Tensor, x0: Tensor) -> None:
            next(bar, None)
            if callback is not None:
                x = levels.comfy_input(x_t, log_snrs[step : step + 1].expand(len(x_t)))
                callback(step, x0 * levels.data_scale, x, steps)

        bar = iter(trange(steps, disable=disable_pbar))
        next(bar)
        x0 = generate(
            answer,
            first,
            noise,
            process=levels.process,
            log_snrs=log_snrs,
            seed=extra_args.get("seed") or 0,
            between=self.between,
            callback=after,
        )
        return x0 * levels.data_scale


def given_of(latent: Tensor, levels: NoiseLevels) -> Tensor | None:
    """What of the latent (b, c, …) is to be begun from, in our scale; None of an empty one."""
    if not bool(torch.isfinite(latent).all()):
        raise ValueError("the latent has values that are not finite (NaN or infinite): look at what made it")
    return latent / levels.data_scale if torch.count_nonzero(latent) else None


def masked_answer(
    model_wrap: Any, levels: NoiseLevels, sigmas: Tensor, latent: Tensor, noise: Tensor, extra_args: dict
) -> Answer:
    """The model with its guider and the mask in ``extra_args``: x0 in our scale for our x_t.

    The mask is ComfyUI's own work, so that what other nodes and models do to masks is done; but for models whose x
    is variance preserving (CogVideoX), of which it noises the latent in another scale.
    """
    masked = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
    masked.latent_image, masked.noise = latent, noise
    mask = extra_args["denoise_mask"]
    by_us = mask is not None and levels.kind.counted == "vp"
    arguments = extra_args | {"denoise_mask": None} if by_us else extra_args
    # Told as they were given, not as they come back from log_snr.
    told = dict(zip(levels.log_snr(sigmas[:-1]).tolist(), sigmas, strict=False))

    def answer(x_t: Tensor, log_snr: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = told[log_snr[0].item()].repeat(len(x_t))
        return masked(levels.comfy_input(x_t, log_snr), sigma, **arguments).float() / levels.data_scale

    return inpainting(answer, levels.process, latent / levels.data_scale, noise, mask) if by_us else answer


def draw(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    negative: list | None,
    cfg: float,
    latent: dict,
    seed: int,
    sampler: OneStep,
    sigmas: Tensor,
) -> dict:
    """The LATENT that SamplerCustomAdvanced makes of these with a CFGGuider, and RandomNoise of ``seed``.

    ValueError for a conditioning of another model's text encoder.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive} | ({} if negative is None else {"negative": negative}))
    guider.set_cfg(cfg)
    samples = latent["samples"]
    try:
        drawn = guider.sample(
            comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
            samples,
            sampler,
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    except RuntimeError as error:
        if reason := misfit(model, positive):  # where another node was to translate it
            raise ValueError(f"the model failed on this positive, which {reason}") from error
        raise
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return kept | {"samples": drawn.to(comfy.model_management.intermediate_device())}


def in_float32(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """The model on a clone that computes in float32, whatever its weights are kept in."""
    clone = model.clone()
    clone.set_model_compute_dtype(torch.float32)
    return clone


def empty_latent(model: comfy.model_patcher.ModelPatcher, width: int, height: int, batch_size: int) -> dict:
    """An empty LATENT of the model's own shape. ValueError for a size in pixels that its latents do not have."""
    form = model.get_model_object("latent_format")
    if form.latent_dimensions not in (2, 3):
        raise ValueError(f"this model's latents have {form.latent_dimensions} dimension: link a latent of its own kind")
    side = form.spacial_downscale_ratio
    if width % side or height % side:
        near = f"{max(side, width - width % side)}x{max(side, height - height % side)}"
        raise ValueError(f"a picture of {width}x{height}: this model draws multiples of {side} pixels, such as {near}")
    frames = [1] if form.latent_dimensions == 3 else []
    shape = (batch_size, form.latent_channels, *frames, height // side, width // side)
    return {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}


def fitting_latent(model: comfy.model_patcher.ModelPatcher, latent: dict) -> dict:
    """A linked LATENT in the model's shape, as stock samplers take it. ValueError for one of another kind of model."""
    mask = latent.get("noise_mask")
    if mask is not None and not bool(torch.isfinite(mask).all()):
        raise ValueError(
            "the mask of the latent has values that are not finite (NaN or infinite): look at what made it"
        )
    samples, form = latent["samples"], model.get_model_object("latent_format")
    if not samples.is_nested:
        empty = torch.count_nonzero(samples) == 0
        if not empty and samples.shape[1] != form.latent_channels:
            raise ValueError(
                f"the latent has {samples.shape[1]} channels, this model's have {form.latent_channels}: encode the "
                "picture with this model's own VAE"
            )
        wanted = form.latent_dimensions + 2
        if samples.ndim != wanted and not (wanted == 5 and samples.ndim == 4):
            raise ValueError(f"the latent has shape {tuple(samples.shape)}: this model's have {wanted} dimensions")
    fix = comfy.sample.fix_empty_latent_channels
    ratios = [name for name in inspect.signature(fix).parameters if name.startswith("downscale_ratio")]
    return latent | {"samples": fix(model, samples, **{name: latent.get(name) for name in ratios})}


def is_picture(latent: dict) -> bool:
    """Whether a LATENT has something in it."""
    samples = latent["samples"]
    return any(bool(torch.count_nonzero(part)) for part in (samples.unbind() if samples.is_nested else [samples]))


def widths(conditioning: list) -> set[int]:
    """Of the text encodings of a CONDITIONING."""
    return {entry[0].shape[-1] for entry in conditioning if entry[0] is not None}


def check_conditionings(positive: list, negative: list | None, cfg: float) -> None:
    """ValueError for guidance that has nothing to guide away from, or encodings of two text encoders."""
    if not positive:
        raise ValueError("the positive conditioning is empty: link a CLIP Text Encode of this model's text encoder")
    check_sound({"positive": positive, **({"negative": negative} if negative and cfg != 1 else {})})
    if not math.isfinite(cfg):
        raise ValueError(f"cfg is {cfg}: expected a number; 1 is none, and what distilled models are made for")
    if cfg != 1 and not negative:
        raise ValueError(
            f"cfg is {cfg:g}, and there is no negative: link one, or set cfg to 1, which needs none and is "
            "what diffusers calls a guidance scale of 0"
        )
    if negative and widths(positive) and widths(negative) and widths(positive) != widths(negative):
        raise ValueError(
            f"positive and negative come from different text encoders: their encodings are {sorted(widths(positive))} "
            f"and {sorted(widths(negative))} wide. Encode both with this model's"
        )
