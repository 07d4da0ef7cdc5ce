"""A window of noise levels: its widgets, which several nodes have, and what they state."""

from typing import TYPE_CHECKING

from comfy_api.latest import io

if TYPE_CHECKING:
    from ..training.windows import Window

ALL_LEVELS, STYLE, CUSTOM = "all noise levels", "where style is made", "from window_low to window_high"
WIDEST = 20.0  # in log_snr; a limit of the window that is as far out is none


def window_widgets(tooltip: str, *, high: float, prefix: str = "") -> list[io.Input]:
    """Which window, and the ends of one of the user's own; ``high``: the default of the cleaner one. ``prefix``: of
    their names, where there are several windows."""
    return [
        io.Combo.Input(
            f"{prefix}window",
            options=[ALL_LEVELS, STYLE, CUSTOM],
            default=ALL_LEVELS,
            optional=True,
            advanced=True,
            tooltip=tooltip,
        ),
        _end(f"{prefix}window_low", -WIDEST, "the noisiest level, in log_snr. -20 = no limit, from pure noise on."),
        _end(f"{prefix}window_high", high, "the cleanest level, in log_snr. 20 = no limit, down to the last step."),
    ]


def _end(name: str, default: float, what: str) -> io.Input:
    return io.Float.Input(
        name,
        default=default,
        min=-WIDEST,
        max=WIDEST,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip=f"Counts with {CUSTOM!r} alone: {what}",
    )


def window_of(choice: str, model: object, low: float, high: float, edge: float, outside: float) -> "Window | None":
    """The window that these widgets state; None for all noise levels. ValueError for one without an inside."""
    import math

    from ..training.windows import Window, style_window
    from .bridge.families import reference_tokens

    if choice == ALL_LEVELS:
        return None
    if choice == STYLE:
        stated = style_window(reference_tokens(model))
        return Window(stated.low, stated.high, edge, outside, stated.reference_tokens)
    low = -math.inf if low <= -WIDEST else low
    return Window(low, math.inf if high >= WIDEST else high, edge, outside)
