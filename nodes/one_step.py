"""Generators of one step or a few, each at its own time: all in one, and as SAMPLER and SIGMAS."""

import logging

from comfy_api.latest import io

from .bridge.one_step import check_conditionings, draw, fitting_latent, in_float32, is_picture
from .bridge.one_step_plan import Wishes, plan, sized_latent
from .bridge.previews import show_text
from .bridge.sound import check_fits
from .bridge.students import several_students
from .one_step_inputs import level_widgets

logger = logging.getLogger(__name__)


class OneStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepSampler",
            display_name="One-Step Sampler",
            category="stylewright/sampling",
            description=(
                "Draws with a model that was distilled to one step, or a few: Turbo, SwiftBrush and PG-SB, DMD2, "
                "Hyper-SD, Lightning, LCM, FLUX schnell. The model is fed unit noise at its own time, which stock "
                "samplers do only at the last one."
            ),
            search_aliases=[
                "one step", "turbo", "lightning", "lcm", "dmd2", "schnell", "hyper sd", "swiftbrush", "ksampler",
                "few steps",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A distilled model, or a model with a distilled LoRA on it."),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Used only where cfg is not 1. Distilled models need none."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="A picture to begin from, with or without a mask, or an empty latent that says the size. "
                    "Not linked: an empty one of the size below.",
                ),
                *level_widgets(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise; the same as a KSampler's.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="1 = no guidance and no second pass, as distilled models want it (diffusers calls that 0).",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="In pixels, where no latent is linked. 0 = as the preset's model was made for.",
                ),
                io.Int.Input("height", default=0, min=0, max=16384, step=8, tooltip="The same."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures, where no latent is linked."),
            ],
            outputs=[io.Latent.Output("latent", tooltip="The picture, for a VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: object,
        positive: list,
        preset: str,
        steps: int,
        denoise: float,
        levels: str,
        unit: str,
        between_steps: str,
        start: str,
        seed: int,
        cfg: float,
        width: int,
        height: int,
        batch_size: int,
        negative: list | None = None,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        check_conditionings(positive, negative, cfg)
        check_fits(model, {"positive": positive, **({"negative": negative} if negative and cfg != 1 else {})})
        made = plan(model, Wishes(preset, steps, levels, unit, denoise, between_steps, start))
        begun = fitting_latent(model, latent) if latent else sized_latent(model, made, width, height, batch_size)
        notes = several_students(model)
        if latent and not made.visible and "noise_mask" not in begun and is_picture(begun):
            notes.append("hardly anything of the given picture is left at this level: lower denoise")
        if made.float32:
            model = in_float32(model)
            notes += [f"{note}: it does here" for note in made.notes]
        say(cls.hidden.unique_id, made.text, notes)
        return io.NodeOutput(draw(model, positive, negative, cfg, begun, seed, made.sampler, made.sigmas))


class OneStepSamplerParts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepSamplerParts",
            display_name="One-Step Sampler (parts)",
            category="stylewright/sampling",
            description=(
                "The SAMPLER and the SIGMAS of the One-Step Sampler, for SamplerCustomAdvanced with a guider and noise "
                "of your choice."
            ),
            search_aliases=["one step", "turbo", "lightning", "lcm", "dmd2", "sampler", "sigmas", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled."),
                *level_widgets(),
            ],
            outputs=[
                io.Sampler.Output("sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced."),
                io.Sigmas.Output("sigmas", tooltip="The levels, and 0."),
                io.String.Output("info", tooltip="The levels in every unit."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        preset: str,
        steps: int,
        denoise: float,
        levels: str,
        unit: str,
        between_steps: str,
        start: str,
    ) -> io.NodeOutput:
        made = plan(model, Wishes(preset, steps, levels, unit, denoise, between_steps, start))
        notes = several_students(model)
        notes += [f"{note}: put ModelComputeDtype with fp32 before the guider" for note in made.notes]
        return io.NodeOutput(made.sampler, made.sigmas, say(cls.hidden.unique_id, made.text, notes))


def say(node_id: str | None, text: str, notes: list[str]) -> str:
    """Shows on the node what is done, and what the user should know. The text that is shown."""
    for note in notes:
        logger.warning("%s", note)
    shown = "\n".join([text, *notes])
    show_text(node_id, shown)
    return shown
