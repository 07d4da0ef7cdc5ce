"""``stylewright density``: what a law of the noise level draws, before anybody trains with it."""

from typing import Annotated, Any

import typer

from .output import Json, show

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)

Preset = Annotated[str, typer.Option(help="A named law; --mu and --sigma replace its own.")]
Mu = Annotated[float | None, typer.Option(help="Mean of log_snr.")]
Sigma = Annotated[float | None, typer.Option(help="Standard deviation of log_snr.")]
Shift = Annotated[float, typer.Option(help="A further timestep shift: adds -2 log(shift). 1 = none.")]
ReferenceTokens = Annotated[
    int | None, typer.Option(help="Image tokens that the law is stated for; carried to --tokens. None = any number.")
]
Tokens = Annotated[int, typer.Option(help="Image tokens of the pictures to train on (4096 = 1024x1024 on FLUX).")]
Family = Annotated[str | None, typer.Option(help="Truncate to this family's range: flux, sd3, sdxl, sd15, pixart.")]
Below = Annotated[list[float] | None, typer.Option(help="Print P(log_snr < x) for this x; may be repeated.")]


def density(
    preset: Preset = "style-friendly",
    mu: Mu = None,
    sigma: Sigma = None,
    shift: Shift = 1.0,
    reference_tokens: ReferenceTokens = None,
    tokens: Tokens = 4096,
    family: Family = None,
    below: Below = None,
    as_json: Json = False,
) -> None:
    """Mean, quantiles and share of the style window of any law on any family's range."""
    from ..density_presets import DensityConfig

    config = DensityConfig(preset=preset, mu=mu, sigma=sigma, shift=shift, reference_tokens=reference_tokens)
    result = measure(config, family, tokens, below or [])
    show(result, lines_of(result), as_json)


def measure(config: Any, family: str | None, tokens: int, below: list[float]) -> dict[str, Any]:
    """The figures of a law (a DensityConfig). ``t`` is flow time, 1 = noise; shares are of draws."""
    import torch

    from ..densities import mean_time, quantiles, share_below
    from ..density_presets import style_window
    from ..noise import time_of_log_snr

    law = law_of(config, family, tokens)
    levels = quantiles(law, SHARES)
    times = time_of_log_snr(torch.tensor(levels)).tolist()
    window = style_window(config, tokens)
    return {
        "density": law.describe(),
        "family": family,
        "mean_t": mean_time(law),
        "quantiles": [
            {"share": share, "log_snr": level, "t": time}
            for share, level, time in zip(SHARES, levels, times, strict=True)
        ],
        "below": {f"{x:g}": share_below(law, x) for x in below},
        "style_window": {"below": window, "share": share_below(law, window)},
    }


def law_of(config: Any, family: str | None, tokens: int) -> Any:
    """The law on the family's range, or without a family on the whole line. ValueError for an unknown family."""
    import math

    from ..density_presets import build_density

    whole = (-math.inf, math.inf)
    law: Any = build_density(config, whole if family is None else range_of(family), tokens)
    return law.density if family is None else law


def range_of(family: str) -> tuple[float, float]:
    """The log_snr that models of this family were trained on."""
    from ..clocks import FLOW_RANGE, DiscreteClock, linear_alphas, scaled_linear_alphas

    ranges = {
        "flux": lambda: FLOW_RANGE,
        "sd3": lambda: FLOW_RANGE,
        "sdxl": lambda: DiscreteClock(scaled_linear_alphas()).log_snr_range,
        "sd15": lambda: DiscreteClock(scaled_linear_alphas()).log_snr_range,
        "pixart": lambda: DiscreteClock(linear_alphas()).log_snr_range,
    }
    if family not in ranges:
        raise ValueError(f"Unknown family {family!r}: expected one of {', '.join(ranges)}.")
    return ranges[family]()


def lines_of(result: dict[str, Any]) -> list[str]:
    """The same figures for people."""
    from ..densities import sentence

    window = result["style_window"]
    where = f" on the range of {result['family']}" if result["family"] else ""
    return [
        f"{sentence(result['density'])}{where}",
        f"mean t {result['mean_t']:.4f}   (flow time: 0 = data, 1 = noise)",
        "draws below   log_snr        t",
        *(f"{100 * q['share']:9.0f} %   {q['log_snr']:7.3f}   {q['t']:.4f}" for q in result["quantiles"]),
        *(f"P(log_snr < {x}) = {share:.4f}" for x, share in result["below"].items()),
        f"style window (log_snr < {window['below']:g}): {100 * window['share']:.1f} % of the draws",
    ]
