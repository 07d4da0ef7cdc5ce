"""The trainer's inputs that say how its sample pictures are drawn: a KSampler's. Add at the end only."""

from comfy_api.latest import io

from .bridge.sampling import SAMPLERS, SCHEDULERS


def sampling(side: str = "the dataset's resolution") -> list[io.Input]:
    """``side``: what a width or height of 0 means, for the tooltips."""
    return [
        io.Combo.Input(
            "sample_sampler",
            options=list(SAMPLERS),
            default="euler",
            optional=True,
            advanced=True,
            tooltip="Sampler of the sample pictures. With your KSampler's settings they are what it will draw.",
        ),
        io.Combo.Input(
            "sample_scheduler",
            options=list(SCHEDULERS),
            default="simple",
            optional=True,
            advanced=True,
            tooltip="Scheduler of the sample pictures.",
        ),
        io.Int.Input(
            "sample_seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            optional=True,
            advanced=True,
            tooltip="Seed of the sample pictures, the same at every step and for every prompt.",
        ),
        io.String.Input(
            "sample_negative",
            default="",
            multiline=True,
            optional=True,
            advanced=True,
            tooltip="Negative prompt of the sample pictures, used where sample_cfg is above 1.",
        ),
        io.Int.Input(
            "sample_width",
            default=0,
            min=0,
            max=8192,
            step=16,
            optional=True,
            advanced=True,
            tooltip=f"Width of the sample pictures in pixels. 0 = {side}.",
        ),
        io.Int.Input(
            "sample_height",
            default=0,
            min=0,
            max=8192,
            step=16,
            optional=True,
            advanced=True,
            tooltip=f"Height of the sample pictures in pixels. 0 = {side}.",
        ),
    ]
