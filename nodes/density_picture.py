"""A law of the noise level as a picture, drawn with Pillow alone."""

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..training.densities import Density, mean_time, quantiles, share_below
from ..training.noise import time_of_log_snr

LOW, HIGH = -14, 8  # of the axis, in log_snr; it is longer where the law is
TAIL = 0.001  # share of the draws that may lie beyond the axis on either side
WIDTH, HEIGHT = 640, 360  # pixels
LEFT, TOP, RIGHT, BOTTOM = 24, 64, 616, 308  # of the plot
FINE = 3  # drawn so many times larger, for smooth edges
CURVE, FILL, WINDOW, AXIS, TEXT = "#2e6f95", "#c9deea", "#f3e3dd", "#8d99ae", "#22303c"
TICKS = (1, 2, 4, 8, 16, 32)  # possible gaps between ticks
MOST_TICKS = 7


@dataclass(frozen=True)
class Axis:
    """The noise levels that the picture shows."""

    low: int
    high: int

    def x(self, log_snr: float) -> float:
        """Pixels from the left."""
        return LEFT + (log_snr - self.low) / (self.high - self.low) * (RIGHT - LEFT)

    @property
    def ticks(self) -> list[int]:
        gap = next((gap for gap in TICKS if (self.high - self.low) // gap < MOST_TICKS), TICKS[-1])
        return [tick for tick in range(self.low, self.high + 1) if tick % gap == 0]


def axis_of(density: Density) -> Axis:
    first, last = quantiles(density, (TAIL, 1 - TAIL))
    return Axis(min(LOW, math.floor(first) - 1), max(HIGH, math.ceil(last) + 1))


def draw_density(density: Density, title: str, window: float) -> Tensor:
    """The law over log_snr with its mean, quantiles and share of the style window, (1, h, w, 3) in [0, 1].

    ``window``: log_snr below which style is decided.
    """
    image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
    draw, axis = ImageDraw.Draw(image), axis_of(density)
    _box(draw, LEFT, TOP, axis.x(window), BOTTOM, WINDOW)
    points = curve(density, axis)
    draw.polygon([_fine(LEFT, BOTTOM), *points, _fine(RIGHT, BOTTOM)], fill=FILL)
    draw.line(points, fill=CURVE, width=2 * FINE, joint="curve")
    draw.line([_fine(LEFT, BOTTOM), _fine(RIGHT, BOTTOM)], fill=AXIS, width=FINE)
    for tick in axis.ticks:
        time = time_of_log_snr(torch.tensor(float(tick))).item()
        draw.line([_fine(axis.x(tick), BOTTOM), _fine(axis.x(tick), BOTTOM + 4)], fill=AXIS, width=FINE)
        _write(draw, axis.x(tick), BOTTOM + 6, f"{tick}", 12, "ma")
        _write(draw, axis.x(tick), BOTTOM + 21, f"t {time:.3f}", 10, "ma", AXIS)
    _write(draw, LEFT, BOTTOM + 36, "log-SNR: noise on the left, data on the right", 11, "la", AXIS)
    _write(draw, LEFT, 10, title, 17, "la")
    _write(draw, LEFT, 36, summary(density, window), 12, "la")
    _write(draw, LEFT + 4, TOP + 4, "style window", 11, "la", "#b0654a")
    small = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(1, HEIGHT, WIDTH, 3).float() / 255


def summary(density: Density, window: float) -> str:
    """The figures in one line."""
    low, median, high = quantiles(density, (0.05, 0.5, 0.95))
    return (
        f"median {median:.2f}, 90 % of the draws in [{low:.2f}, {high:.2f}], mean t {mean_time(density, 2000):.3f}, "
        f"{100 * share_below(density, window):.1f} % in the style window"
    )


def curve(density: Density, axis: Axis) -> list[tuple[float, float]]:
    """Points of the law's probability per pixel column, scaled to the plot's height."""
    columns = (RIGHT - LEFT) * FINE
    edges = torch.linspace(axis.low, axis.high, columns + 1, dtype=torch.float64)
    mass = density.cdf(edges).diff()
    heights = (mass / mass.max().clamp(min=1e-12) * (BOTTOM - TOP - 24)).tolist()
    return [(LEFT * FINE + column + 0.5, (BOTTOM - height) * FINE) for column, height in enumerate(heights)]


def _fine(x: float, y: float) -> tuple[float, float]:
    return x * FINE, y * FINE


def _box(draw: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, colour: str) -> None:
    draw.rectangle([_fine(left, top), _fine(right, bottom)], fill=colour)


def _write(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, anchor: str, colour: str = TEXT
) -> None:
    draw.text(_fine(x, y), text, fill=colour, font=ImageFont.load_default(size * FINE), anchor=anchor)
