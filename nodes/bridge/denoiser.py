"""A loaded MODEL as the core's denoiser, through ``BaseModel.apply_model``.

``apply_model`` is the one call that every family answers alike. It honours what other nodes patched in
(attention, model sampling, wrappers) and returns the clean latent x0, from which the model's own prediction is
recovered: the loss belongs there, not on x0, whose error grows with the noise.
"""

import logging
import uuid
from collections.abc import Sequence
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from ...training.clocks import Clock
from ...training.denoiser import SIZES, Conditioning
from ...training.predictions import convert
from .families import family_of, is_film, is_mean_flow
from .kept_conds import KeptConds
from .kernels import OVERRIDE, PATCHES, Attention, Patch
from .noise_levels import clock_of, noise_levels
from .prompts import GUIDANCE, PROMPT, PromptTable

logger = logging.getLogger(__name__)

STATED_SIZES = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")  # in the order of SIZES


class ComfyDenoiser:
    """A denoiser over a model that :func:`~.session.training_session` has made ready.

    Conditioning: ``prompt`` (b,) rows of ``prompts``, and optionally ``guidance`` (b,).
    """

    def __init__(self, model: comfy.model_patcher.ModelPatcher, prompts: PromptTable) -> None:
        self.family = family_of(model)
        self.module: nn.Module = model.model.diffusion_model
        self._levels = noise_levels(model)
        self.process = self._levels.process
        self.prediction = self._levels.prediction
        self.log_snr_range = self._levels.log_snr_range
        self.model = model
        self.prompts = prompts
        self._film = is_film(model)
        self._alone = is_mean_flow(model)
        self._options = transformer_options(model)
        self._conds = KeptConds()

    @property
    def clock(self) -> Clock:
        """ValueError for a model whose time cannot be stated."""
        return clock_of(self.model.get_model_object("model_sampling"))

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's own prediction (b, c, ...) in float32."""
        sigma = self._levels.sigma(log_snr)
        x = self._levels.comfy_input(x_t.float(), log_snr)
        x0 = torch.empty_like(x)
        rows = self._model_conds(x, conditioning)
        for group in [[row] for row in range(len(rows))] if self._alone else alike(rows):
            conds = comfy.samplers.cond_cat([rows[row] for row in group])
            answer = self._apply(x[group], sigma[group], conds)
            x0 = answer if len(group) == len(x) else x0.index_copy(0, torch.tensor(group, device=x.device), answer)
        return convert(x0 / self._levels.data_scale, "x0", self.prediction, self.process, x_t, log_snr)

    def longest(self, rows: Sequence[Conditioning]) -> Conditioning:
        """Of rows (1, …), the one whose prompt has most tokens."""
        return max(rows, key=lambda row: self.prompts.answer(int(row[PROMPT][0]))["cross_attn"].shape[1])

    def _apply(self, x: Tensor, sigma: Tensor, conds: dict) -> Tensor:
        options = {**self._options, "cond_or_uncond": [0], "uuids": [uuid.uuid4()], "sigmas": sigma}
        # A schedule that stays where it is: the mean velocity from here to here is the velocity that is trained.
        options["sample_sigmas"] = sigma[:1].repeat(2)
        x = x[:, :, None] if self._film else x
        x0 = self.model.model.apply_model(x, sigma, transformer_options=options, **conds).float()
        return x0[:, :, 0] if self._film else x0

    def _model_conds(self, x: Tensor, conditioning: Conditioning) -> list[dict]:
        """ComfyUI's conds of each row, made once for every prompt, guidance and latent size that lasts."""
        prompts = conditioning[PROMPT].tolist()
        guidances = conditioning[GUIDANCE].tolist() if GUIDANCE in conditioning else [None] * len(prompts)
        sizes = map(tuple, conditioning[SIZES].tolist()) if SIZES in conditioning else [None] * len(prompts)
        keys = [(*each, x.shape[1:]) for each in zip(prompts, guidances, sizes, strict=True)]
        conds = self._conds if self.prompts.lasting else KeptConds()
        for key in dict.fromkeys(keys):
            if key not in conds:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.prompts.lasting):
                    conds[key] = self._make_conds(x[:1], *key[:3])
        conds.shrink(keys)
        return [conds[key] for key in keys]

    def _make_conds(self, noise: Tensor, prompt: int, guidance: float | None, sizes: tuple[int, ...] | None) -> dict:
        noise = noise[:, :, None] if self._film else noise
        # What comfy.samplers.encode_model_conds adds; it too takes every latent for 8 times smaller than the picture.
        params: dict[str, Any] = {"device": noise.device, "noise": noise, "latent_image": torch.zeros_like(noise)}
        params |= {"height": noise.shape[-2] * 8, "width": noise.shape[-1] * 8, "prompt_type": "positive"}
        if guidance is not None:
            params["guidance"] = guidance
        answer = self.prompts.answer(prompt)  # a conditioning that a user made may state guidance and sizes itself
        if sizes is not None and answer.keys().isdisjoint(STATED_SIZES):
            params |= stated_sizes(sizes)
        params |= answer
        conds = self.model.model.extra_conds(**params)
        return {name: cond.process_cond(batch_size=1, area=None) for name, cond in conds.items()}


def stated_sizes(sizes: tuple[int, ...]) -> dict[str, float]:
    """The conditioning SIZES of one picture as ``extra_conds`` of SDXL, PixArt and Hunyuan-DiT take it."""
    return {**dict(zip(STATED_SIZES, sizes, strict=True)), "aspect_ratio": sizes[4] / sizes[5]}


def alike(rows: list[dict]) -> list[list[int]]:
    """Rows that fit into one batch, by ComfyUI's own rule: prompts of unlike length run one after the other."""
    groups: list[list[int]] = []
    for row, conds in enumerate(rows):
        for group in groups:
            if comfy.samplers.cond_equal_size(rows[group[0]], conds):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def transformer_options(model: comfy.model_patcher.ModelPatcher) -> dict:
    """The patches, wrappers and callbacks that nodes before ours put on the model, as a sampler passes them."""
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    if "model_function_wrapper" in options:
        logger.warning("a node before wraps every call of the model, to cache steps for example: trained without it")
    comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
    comfy.samplers.cast_to_load_options(options, device=model.load_device, dtype=model.model_dtype())
    chosen = options["transformer_options"]
    if OVERRIDE in chosen:
        chosen[OVERRIDE] = Attention(chosen[OVERRIDE])
    if PATCHES in chosen:
        chosen[PATCHES] = {
            place: [Patch(patch) if callable(patch) else patch for patch in patches]
            for place, patches in chosen[PATCHES].items()
        }
    return chosen
