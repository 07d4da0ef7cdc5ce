"""The loader's strengths: by part of the model, and by noise level. Appended to its inputs, in this order for ever."""

from comfy_api.latest import io

from .window_inputs import window_widgets

GROUPS = ("early", "middle", "late", "attention", "mlp")

_MEANING = {
    "early": "the first third of the model's blocks",
    "middle": "the middle third of the model's blocks",
    "late": "the last third of the model's blocks",
    "attention": "the attention layers",
    "mlp": "the MLP layers",
}


def strength_widgets() -> list[io.Input]:
    """All of them, for a user who asks for more than one strength."""
    return [
        *(
            io.Float.Input(
                group,
                default=1.0,
                min=-10.0,
                max=10.0,
                step=0.05,
                optional=True,
                advanced=True,
                tooltip=f"A factor on the strength of {_MEANING[group]}. A layer that is in several groups gets all of "
                "their factors.",
            )
            for group in GROUPS
        ),
        io.String.Input(
            "group_strengths",
            default="",
            multiline=True,
            placeholder="text = 0.5\ndouble_blocks.0-7 = 0",
            optional=True,
            advanced=True,
            tooltip="More factors, one line each: a group (text, image, cross, fused, modulation, convolution, other) "
            "or a part of layers' names, where * stands for anything and 0-7 for these numbers.",
        ),
        *window_widgets(
            "The noise levels at which the adapter acts. Where style is made: log_snr below -6.52 at 1024x1024, as "
            "Style-Friendly SNR Sampler found.",
            high=-6.5,
        ),
        io.Float.Input(
            "window_edge",
            default=0.0,
            min=0.0,
            max=20.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Width in log_snr over which the adapter comes and goes at an end of the window. 0 = at once.",
        ),
        io.Float.Input(
            "outside",
            default=0.0,
            min=-10.0,
            max=10.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="Share of the strength that is left outside of the window. 0 = the model as it is without the "
            "adapter.",
        ),
    ]
