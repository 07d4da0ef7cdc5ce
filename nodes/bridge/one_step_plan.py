"""What the one-step nodes' widgets mean for a model: its sigmas and a sampler, checked, and said in words."""

import re
from dataclasses import dataclass, field, replace

import comfy.model_patcher
import torch
from torch import Tensor

from ...training.noise import alpha_sigma
from ...training.one_step import ANCESTRAL, FRESH, IMPLIED, SCALED, UNIT, amplification
from ...training.one_step_presets import ONE_STEP_PRESETS, OneStepPreset
from .families import family_of, is_guidance_distilled, model_name
from .noise_levels import NoiseLevels
from .one_step import OneStep, empty_latent
from .one_step_levels import describe, levels_to_draw, partly, schedule, sigma_of
from .students import preset_of

CUSTOM = "custom"
OF_STUDENT = "as the student's file says"
OF_PRESET = "as the preset says"
BETWEEN = {"fresh noise": FRESH, "ancestral noise": ANCESTRAL, "implied noise": IMPLIED}
AGAIN = {FRESH: "freshly", ANCESTRAL: "in part freshly", IMPLIED: "with the noise it implies"}
STARTS = {"unit noise": UNIT, "sigma x noise": SCALED}
SIDES = {"sd15": 512, "sd21": 512}  # of pictures, where a preset is for several families
ROUNDED = 50.0  # times that an error of the prediction counts, from where half precision is seen
HOPELESS = 1000.0  # from where nothing of the data is left in what predicts noise
VANISHED = 0.1  # alpha of the first level, below which hardly anything is left of a given picture


@dataclass(frozen=True)
class Wishes:
    """The widgets."""

    preset: str = CUSTOM
    steps: int = 0  # 0 = the preset's usual number, or as many as there are levels
    levels: str = ""
    unit: str = "time"
    denoise: float = 1.0
    between: str = OF_PRESET
    start: str = OF_PRESET


@dataclass(frozen=True)
class Plan:
    """What to draw with."""

    sigmas: Tensor  # (steps + 1,), the last 0
    sampler: OneStep
    side: int | None  # pixels of a usual picture
    float32: bool  # whether the network's own arithmetic should be in it
    visible: bool  # whether a given picture is seen at the first level
    text: str
    notes: list[str] = field(default_factory=list)


def plan(model: comfy.model_patcher.ModelPatcher, wishes: Wishes) -> Plan:
    """ValueError for a preset of another model, and for levels that the model does not have."""
    sampling = model.get_model_object("model_sampling")
    levels = levels_to_draw(sampling)
    preset = preset_of(model) if wishes.preset == OF_STUDENT else ONE_STEP_PRESETS.get(wishes.preset)
    if preset:
        check_preset(model, levels, wishes.preset, preset)
    sigmas = partly(sampling, stated_sigmas(sampling, levels, preset, wishes), wishes.denoise)
    if any(a <= b for a, b in zip(sigmas[:-1], sigmas[1:], strict=True)):
        raise ValueError(
            "the levels do not go from noise to data: expected times and sigmas that decrease, or log_snr that increase"
        )
    sampler = OneStep(
        between=BETWEEN.get(wishes.between, preset.between if preset else FRESH),
        start=STARTS.get(wishes.start, preset.start if preset else UNIT),
        anew=wishes.denoise == 1,
    )
    log_snrs = levels.log_snr(torch.tensor(sigmas))
    times = float(amplification(levels.prediction, levels.process, log_snrs).max())
    if times > HOPELESS:
        raise ValueError(
            f"{describe(sampling, levels, sigmas[0])} is pure noise, in which a model that predicts noise says nothing "
            "of the picture: begin at a lower level, or say by ModelSamplingDiscrete what the model predicts"
        )
    made = Plan(
        sigmas=torch.tensor([*sigmas, 0.0]),
        sampler=sampler,
        side=None if preset is None else min(preset.side, SIDES.get(family_of(model), preset.side)),
        float32=times > ROUNDED and computes_in(model) in (torch.float16, torch.bfloat16),
        visible=float(alpha_sigma(levels.process, log_snrs[:1])[0]) >= VANISHED,
        text=text_of(sampling, levels, wishes, sigmas, sampler),
    )
    if not made.float32:
        return made
    rounding = f"a rounding of the prediction counts {times:.0f} times in the picture at this level"
    return replace(made, notes=[f"{rounding}, so that the model should compute in float32"])


def computes_in(model: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    """Of the network's own arithmetic, whichever clone of it is loaded now."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def sized_latent(model: comfy.model_patcher.ModelPatcher, made: Plan, width: int, height: int, batch_size: int) -> dict:
    """An empty LATENT of a size in pixels, 0 = the preset's. ValueError where there is none."""
    if made.side is None and not (width and height):
        raise ValueError(f"no latent is linked, and the preset {CUSTOM} has no size: set width and height")
    return empty_latent(model, width or made.side or 0, height or made.side or 0, batch_size)


def stated_sigmas(sampling: object, levels: NoiseLevels, preset: OneStepPreset | None, wishes: Wishes) -> list[float]:
    """What is stated, or else the preset's, or else the model's own schedule."""
    values = read_levels(wishes.levels)
    if values and preset:
        raise ValueError(
            f"levels are stated, and {wishes.preset} has its own: set the preset to {CUSTOM}, or clear them"
        )
    if values and wishes.steps not in (0, len(values)):
        raise ValueError(f"{len(values)} levels are stated for {wishes.steps} steps: set steps to 0")
    if values:
        return [sigma_of(sampling, levels, value, wishes.unit) for value in values]
    if preset is None:
        return schedule(sampling, wishes.steps or 1)
    steps = wishes.steps or preset.steps[0]
    if steps not in preset.steps:
        raise ValueError(
            f"{wishes.preset} in {steps} steps: it was made for {', '.join(map(str, sorted(preset.steps)))}. Set steps "
            f"to one of these (0 = {preset.steps[0]}), or state levels with the preset {CUSTOM}"
        )
    return [sigma_of(sampling, levels, value, preset.unit) for value in preset.levels(steps)]


def read_levels(text: str) -> list[float]:
    """Numbers with commas, spaces or new lines between. ValueError for what is none."""
    try:
        values = [float(word) for word in re.split(r"[\s,;]+", text.strip()) if word]
    except ValueError as error:
        raise ValueError(f"levels are {text.strip()!r}: expected numbers, for example 999, 749, 499, 249") from error
    if any(value != value for value in values):
        raise ValueError(f"levels are {text.strip()!r}: NaN is no level")
    return values


def check_preset(
    model: comfy.model_patcher.ModelPatcher, levels: NoiseLevels, name: str, preset: OneStepPreset
) -> None:
    """ValueError where a preset is for another model, with those that fit."""
    family = family_of(model)
    fitting = [other for other, each in ONE_STEP_PRESETS.items() if family in each.families]
    instead = f"Presets for it: {', '.join(fitting)}, {CUSTOM}" if fitting else f"Only {CUSTOM} fits it"
    if family not in preset.families:
        raise ValueError(f"{name} is {' or '.join(preset.families)}, and this model is {model_name(model)}. {instead}")
    if levels.prediction != preset.prediction:
        raise ValueError(
            f"{name} predicts {preset.prediction}, and this model is set to {levels.prediction}: check that it is the "
            f"right file, or set {preset.prediction} by ModelSamplingDiscrete"
        )
    if name == "FLUX.1-schnell" and is_guidance_distilled(model):
        raise ValueError(
            f"this model is told a guidance scale, as FLUX.1-dev is and FLUX.1-schnell is not. {instead}, with levels "
            "of your own"
        )


def text_of(sampling: object, levels: NoiseLevels, wishes: Wishes, sigmas: list[float], sampler: OneStep) -> str:
    """What will be done."""
    text = f"{wishes.preset}: " + ", ".join(describe(sampling, levels, sigma) for sigma in sigmas)
    text += ", from unit noise" if sampler.start == UNIT else ", from sigma x noise"
    if len(sigmas) > 1:
        text += ", each noised again " + AGAIN[sampler.between]
    return text
