"""Widgets that the trainer and the distiller have alike, but for what they say and where they begin."""

from comfy_api.latest import io

from ..training.loops.config import AUTOMATIC_PRECISION, PRECISIONS
from ..training.loops.optimizers import SCHEDULES


def seed(tooltip: str) -> io.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False, tooltip=tooltip)


def precision(tooltip: str) -> io.Input:
    options = [*PRECISIONS, AUTOMATIC_PRECISION]
    return io.Combo.Input("precision", options=options, default=AUTOMATIC_PRECISION, tooltip=tooltip)


def sample_prompt(tooltip: str) -> io.Input:
    return io.String.Input(
        "sample_prompt", default="", multiline=True, placeholder="a house by a lake", tooltip=tooltip
    )


def sample_every(default: int) -> io.Input:
    return io.Int.Input(
        "sample_every",
        default=default,
        min=0,
        max=100_000,
        tooltip="Steps between these pictures, the last of which come at the end. 0 = none.",
    )


def sample_steps(tooltip: str) -> io.Input:
    return io.Int.Input("sample_steps", default=20, min=1, max=200, advanced=True, tooltip=tooltip)


def sample_cfg(whose: str) -> io.Input:
    return io.Float.Input(
        "sample_cfg",
        default=1.0,
        min=0.0,
        max=30.0,
        step=0.1,
        advanced=True,
        tooltip=f"Guidance of {whose} pictures: 1 for FLUX.1, 3 for the embedded model, 5 for SDXL.",
    )


def target_patterns() -> io.Input:
    return io.String.Input(
        "target_patterns",
        default="",
        multiline=True,
        placeholder="double_blocks\\.\\d+\\.img_attn\\.qkv",
        advanced=True,
        tooltip="Regular expressions for the ends of layers' names, one a line. They replace the targets above.",
    )


def scheduler(tooltip: str) -> io.Input:
    return io.Combo.Input("scheduler", options=list(SCHEDULES), default="constant", advanced=True, tooltip=tooltip)


def warm_up(tooltip: str) -> io.Input:
    return io.Int.Input("warm_up", default=0, min=0, max=100_000, advanced=True, tooltip=tooltip)


def weight_decay(tooltip: str) -> io.Input:
    return io.Float.Input("weight_decay", default=0.0, min=0.0, max=1.0, step=0.001, advanced=True, tooltip=tooltip)


def clip_norm(of: str) -> io.Input:
    return io.Float.Input(
        "clip_norm",
        default=1.0,
        min=0.0,
        max=1000.0,
        step=0.1,
        advanced=True,
        tooltip=f"Largest norm of {of}. 0 = no limit.",
    )


def ema_decay(default: float, tooltip: str) -> io.Input:
    return io.Float.Input(
        "ema_decay",
        default=default,
        min=0.0,
        max=0.9999,
        step=0.001,
        round=0.0001,
        advanced=True,
        tooltip=tooltip,
    )


def save_every(default: int) -> io.Input:
    return io.Int.Input(
        "save_every",
        default=default,
        min=0,
        max=100_000,
        advanced=True,
        tooltip="Steps between checkpoints, from which a run continues after a crash. 0 = none until it stops.",
    )
