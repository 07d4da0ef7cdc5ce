"""Which noise levels a training run draws: the heart of the method, stated and shown."""

import math

from comfy_api.latest import io, ui

from ..training.density_presets import DENSITIES, DensityConfig, build_density, style_window
from .bridge.families import model_name
from .bridge.families import reference_tokens as stated_tokens
from .bridge.noise_levels import noise_levels
from .density_picture import draw_density
from .sockets import DENSITY, StyleDensity

NORMAL = "normal"
UNBOUNDED = (-math.inf, math.inf)
PIXELS_PER_TOKEN = 16


class StyleDensityNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleDensity",
            display_name="Noise Level Density",
            category="stylewright/training",
            description=(
                "The law from which training draws its noise levels, in log-SNR: low is noise, where style is decided, "
                "high is a clean picture. Shows the law and how much of it falls into the style window."
            ),
            search_aliases=["log snr", "timestep sampling", "noise schedule", "logit normal", "style friendly snr"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "law",
                    options=[NORMAL, *DENSITIES],
                    default=NORMAL,
                    tooltip=f"'{NORMAL}' is N(mu, sigma^2) with the values below; the others bring their own.",
                ),
                io.Float.Input(
                    "mu",
                    default=-6.0,
                    min=-20.0,
                    max=20.0,
                    step=0.1,
                    tooltip=f"Mean log-SNR of the law '{NORMAL}'. -6 is the paper's choice at 1024x1024.",
                ),
                io.Float.Input(
                    "sigma",
                    default=2.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip=f"Standard deviation of the law '{NORMAL}'. The paper: 2 for SD3.5, 3 for FLUX.",
                ),
                io.Int.Input(
                    "reference_tokens",
                    default=0,
                    min=0,
                    max=1 << 20,
                    tooltip=(
                        "The picture size that the law is stated for, in image tokens of 16x16 pixels (4096 = "
                        "1024x1024). Training at another size carries it over: small pictures need less noise. 0 = as "
                        "the model has it: 4096 on the embedded model, off on others."
                    ),
                ),
                io.Float.Input(
                    "shift",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="A further timestep shift, which adds -2 log(shift) to the law. The paper applies none: 1.",
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=64,
                    max=8192,
                    step=16,
                    advanced=True,
                    tooltip="Side of your pictures in pixels, for the drawing only: a trainer asks its dataset.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Shows the law within this model's range (SD1.5 and SDXL know none below -5.4). "
                    "A trainer applies its own model's range in any case.",
                ),
            ],
            outputs=[
                DENSITY.Output("density", tooltip="For the trainer."),
                io.Image.Output(
                    "picture", tooltip="The law, with the paper's style window (log-SNR below -6.52 at 1024x1024)."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        law: str,
        mu: float,
        sigma: float,
        reference_tokens: int,
        shift: float,
        resolution: int,
        model: object = None,
    ) -> io.NodeOutput:
        config = density_config(law, mu, sigma, reference_tokens, shift)
        tokens = (resolution // PIXELS_PER_TOKEN) ** 2
        log_snr_range = UNBOUNDED if model is None else noise_levels(model).log_snr_range
        drawn = config if model is None else config.stated_for(stated_tokens(model))
        density = build_density(drawn, log_snr_range, tokens)
        title = law if law != NORMAL else f"N(mu {mu:g}, sigma {sigma:g})"
        if drawn.reference_tokens not in (None, tokens):
            title += f" of {drawn.reference_tokens} tokens, carried to {tokens}"
        if model is not None:
            title += f" on {model_name(model)}"
        if shift != 1.0:
            title += f", shift {shift:g}"
        picture = draw_density(density, title, style_window(drawn, tokens))
        return io.NodeOutput(StyleDensity(config), picture, ui=ui.PreviewImage(picture, cls=cls))


def density_config(law: str, mu: float, sigma: float, reference_tokens: int, shift: float) -> DensityConfig:
    """The widgets' law, in the core's words."""
    own = {"mu": mu, "sigma": sigma} if law == NORMAL else {}
    preset = "style-friendly" if law == NORMAL else law
    return DensityConfig(preset=preset, shift=shift, reference_tokens=reference_tokens or None, **own)
