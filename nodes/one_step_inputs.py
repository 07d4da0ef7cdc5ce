"""At which noise levels a distilled model is run: the widgets that both one-step nodes have, in this order for ever."""

from comfy_api.latest import io

from ..training.one_step_presets import ONE_STEP_PRESETS
from .bridge.one_step_levels import UNITS
from .bridge.one_step_plan import BETWEEN, CUSTOM, OF_PRESET, OF_STUDENT, STARTS


def level_widgets() -> list[io.Input]:
    """Preset, steps, denoise, and levels of one's own."""
    return [
        io.Combo.Input(
            "preset",
            options=[*ONE_STEP_PRESETS, CUSTOM, OF_STUDENT],
            default=next(iter(ONE_STEP_PRESETS)),
            tooltip="Which distilled model this is. One of another family is refused. With custom: the levels below, "
            "or the model's own schedule where there are none. As the student's file says: of a student that Load "
            "Style LoRA or Embedded Model has put on the model, or that is the file of Load Diffusion Model.",
        ),
        io.Int.Input("steps", default=0, min=0, max=100, tooltip="0 = the preset's usual number."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="Below 1 all levels move towards the data, to this share of the schedule, so that more of a given "
            "picture is kept: 0.5 of time 999 is 499.",
        ),
        io.String.Input(
            "levels",
            default="",
            placeholder="999, 749, 499, 249",
            advanced=True,
            tooltip="With the preset custom: the noise level of each step, the noisiest first.",
        ),
        io.Combo.Input(
            "unit",
            options=list(UNITS),
            default=UNITS[0],
            advanced=True,
            tooltip="Of the levels. Time is what the network is told: 0 to 999 for SD and PixArt, 0 to 1000 for SD3, "
            "0 to 1 for FLUX.",
        ),
        io.Combo.Input(
            "between_steps",
            options=[OF_PRESET, *BETWEEN],
            default=OF_PRESET,
            advanced=True,
            tooltip="How a picture is noised for the next step: with new noise, as of consistency models; with what "
            "the last step implies, as DDIM and Euler do; or, ancestral, with some of both. With custom: fresh.",
        ),
        io.Combo.Input(
            "start",
            options=[OF_PRESET, *STARTS],
            default=OF_PRESET,
            advanced=True,
            tooltip="What the model is fed first, of an empty latent: noise of deviation 1, or of sigma, from which "
            "a few models were trained (SiD-LSG). With custom: unit noise.",
        ),
    ]
