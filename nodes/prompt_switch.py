"""Prompts, and guidance scales, that act in one part of the denoising each."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from comfy_api.latest import io

from .bridge.previews import show_text
from .bridge.thresholds import AS_GIVEN, PAPER, THRESHOLD_UNITS

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FURTHER = ("third", "fourth", "fifth", "sixth")  # a chain of nodes takes more


def _cross_fade(what: str) -> io.Input:
    return io.Float.Input(
        "cross_fade",
        default=0.0,
        min=0.0,
        max=20.0,
        step=0.1,
        advanced=True,
        tooltip=f"Width in log_snr over which {what} 0 = at once.",
    )


def _unit() -> io.Input:
    return io.Combo.Input(
        "unit",
        options=list(THRESHOLD_UNITS),
        default=THRESHOLD_UNITS[0],
        tooltip="Of the thresholds. Time is what the network is told: 0 to 999 for SD and PixArt, 0 to 1000 for SD3, "
        "0 to 1 for FLUX. A share of steps, 0.1 for a tenth, needs sigmas.",
    )


class PromptSwitchByLogSNR(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PromptSwitchByLogSNR",
            display_name="Prompt Switch by Noise Level",
            category="stylewright/sampling",
            description=(
                "Makes one conditioning of several, each acting at its own noise levels: say, one that names the style "
                "while the picture is almost pure noise, where style is decided, and one of the content alone after. "
                "At every level exactly one acts, for any sampler, guider, ControlNet or regional prompt."
            ),
            search_aliases=[
                "prompt switch", "prompt schedule", "prompt editing", "timestep range", "log snr", "style window",
                "conditioning combine",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: thresholds are of its noise levels."),
                io.Conditioning.Input("first", tooltip="Acts from pure noise to the first threshold."),
                io.Conditioning.Input("second", tooltip="Acts from the first threshold on."),
                io.Combo.Input(
                    "preset",
                    options=[AS_GIVEN, *PAPER],
                    default=AS_GIVEN,
                    tooltip="The thresholds of the paper's experiment on FLUX at 1024x1024, after 3 % and 10 % of 28 "
                    "steps. Link a latent to have them carried to its size.",
                ),
                io.String.Input(
                    "thresholds",
                    default="-6.52",
                    tooltip="One number for two prompts, two for three, the noisiest first. The level itself still "
                    "belongs to the noisier prompt.",
                ),
                _unit(),
                _cross_fade(
                    "one prompt goes and the next comes, centred on the threshold. Predictions are averaged, which "
                    "costs a second pass in there."
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="The sampler's steps: shows which of them fall to which prompt."
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The size of the pictures, which a preset is carried to."
                ),
                *(
                    io.Conditioning.Input(name, optional=True, tooltip="One more, after the next threshold.")
                    for name in FURTHER
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", tooltip="For the positive or the negative input of a sampler."),
                io.String.Output("info", tooltip="Where each prompt acts: log_snr, sigma and steps."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: object,
        first: list,
        second: list,
        preset: str,
        thresholds: str,
        unit: str,
        cross_fade: float,
        sigmas: "Tensor | None" = None,
        latent: dict | None = None,
        third: list | None = None,
        fourth: list | None = None,
        fifth: list | None = None,
        sixth: list | None = None,
    ) -> io.NodeOutput:
        from .bridge.sound import check_fits
        from .bridge.switching import check_conditionings, gaps_text, switched
        from .bridge.thresholds import report, thresholds_of

        more = dict(zip(FURTHER, (third, fourth, fifth, sixth), strict=True))
        named = {"first": first, "second": second, **_without_gaps(more)}
        check_conditionings(named)
        check_fits(model, named)
        found = thresholds_of(model, preset, thresholds, unit, cross_fade, len(named), sigmas, latent)
        conditioning = switched(model, list(named.values()), found, sigmas)
        text, warnings = report(found, list(named), sigmas)
        warnings += gaps_text(model, conditioning, sigmas)
        return io.NodeOutput(conditioning, say(cls.hidden.unique_id, text, warnings))


class CFGByLogSNR(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CFGByLogSNR",
            display_name="CFG by Noise Level",
            category="stylewright/sampling",
            description=(
                "Gives a model another guidance scale at each part of the denoising, in the place of the sampler's. "
                "Where the scale is 1 there is no pass of the negative prompt, which saves half of the time. The same "
                "for an adapter's strength: the window of Load Style LoRA."
            ),
            search_aliases=["cfg schedule", "guidance interval", "dynamic cfg", "cfg range", "log snr"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled."),
                io.String.Input(
                    "scales", default="1, 4.5", tooltip="One more than there are thresholds, that of pure noise first."
                ),
                io.String.Input("thresholds", default="-6.52", tooltip="Between the scales, the noisiest first."),
                _unit(),
                _cross_fade("one scale becomes the next, centred on the threshold."),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="The sampler's steps: shows which of them have which scale."
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="For a sampler whose own cfg then means nothing."),
                io.String.Output("info", tooltip="Where each scale holds: log_snr, sigma and steps."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: object, scales: str, thresholds: str, unit: str, cross_fade: float, sigmas: "Tensor | None" = None
    ) -> io.NodeOutput:
        from .bridge.switching import with_scales
        from .bridge.thresholds import read_numbers, report, thresholds_of

        values = read_numbers(scales, "the scales")
        if len(values) < 2:
            raise ValueError(
                f"the scales are {scales!r}: expected two or more; for a single one the sampler has its cfg"
            )
        found = thresholds_of(model, AS_GIVEN, thresholds, unit, cross_fade, len(values), sigmas, None)
        text, warnings = report(found, [f"cfg {value:g}" for value in values], sigmas)
        patched = with_scales(model, found, values, warner(cls.hidden.unique_id))
        return io.NodeOutput(patched, say(cls.hidden.unique_id, text, warnings))


def _without_gaps(more: Mapping[str, list | None]) -> dict[str, list]:
    """The further prompts, in their order. ValueError where one is linked and one before it is not."""
    linked = {name: conditioning for name, conditioning in more.items() if conditioning is not None}
    if [*linked] != list(FURTHER[: len(linked)]):
        missing = next(name for name in FURTHER if name not in linked)
        raise ValueError(f"{[*linked][-1]} is linked and {missing} is not: expected them one after the other")
    return linked


def say(node_id: str | None, text: str, warnings: list[str]) -> str:
    """Shows on the node where what acts, and in the log what the user should know. The text that is shown."""
    for warning in warnings:
        logger.warning("%s", warning)
    shown = "\n".join([text, *(f"note: {warning}" for warning in warnings)])
    show_text(node_id, shown)
    return shown


def warner(node_id: str | None) -> Callable[[str], None]:
    """Says what turns out while sampling."""

    def warn(text: str) -> None:
        logger.warning("%s", text)
        show_text(node_id, text)

    return warn
