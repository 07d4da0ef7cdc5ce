"""A law of the noise level as a picture, drawn with Pillow alone."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..training.densities import STYLE_WINDOW, Density, mean_time, quantiles, share_below
from ..training.noise import time_of_log_snr

LOW, HIGH = -14.0, 8.0  # of the axis, in log_snr
WIDTH, HEIGHT = 640, 360  # pixels
LEFT, TOP, RIGHT, BOTTOM = 24, 64, 616, 308  # of the plot
FINE = 3  # drawn so many times larger, for smooth edges
CURVE, FILL, WINDOW, AXIS, TEXT = "#2e6f95", "#c9deea", "#f3e3dd", "#8d99ae", "#22303c"
TICKS = (-12, -8, -4, 0, 4, 8)


def draw_density(density: Density, title: str) -> Tensor:
    """The law over log_snr with its mean, quantiles and share of the style window, (1, h, w, 3) in [0, 1]."""
    image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
    draw = ImageDraw.Draw(image)
    _box(draw, _x(LOW), TOP, _x(STYLE_WINDOW), BOTTOM, WINDOW)
    points = curve(density)
    draw.polygon([_fine(_x(LOW), BOTTOM), *points, _fine(_x(HIGH), BOTTOM)], fill=FILL)
    draw.line(points, fill=CURVE, width=2 * FINE, joint="curve")
    draw.line([_fine(LEFT, BOTTOM), _fine(RIGHT, BOTTOM)], fill=AXIS, width=FINE)
    for tick in TICKS:
        time = time_of_log_snr(torch.tensor(float(tick))).item()
        draw.line([_fine(_x(tick), BOTTOM), _fine(_x(tick), BOTTOM + 4)], fill=AXIS, width=FINE)
        _write(draw, _x(tick), BOTTOM + 6, f"{tick}", 12, "ma")
        _write(draw, _x(tick), BOTTOM + 21, f"t {time:.3f}", 10, "ma", AXIS)
    _write(draw, LEFT, BOTTOM + 36, "log-SNR: noise on the left, data on the right", 11, "la", AXIS)
    _write(draw, LEFT, 10, title, 17, "la")
    _write(draw, LEFT, 36, summary(density), 12, "la")
    _write(draw, LEFT + 4, TOP + 4, "style window", 11, "la", "#b0654a")
    small = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(1, HEIGHT, WIDTH, 3).float() / 255


def summary(density: Density) -> str:
    """The figures in one line."""
    low, median, high = quantiles(density, (0.05, 0.5, 0.95))
    share = 100 * share_below(density, STYLE_WINDOW)
    return (
        f"median {median:.2f}, 90 % of the draws in [{low:.2f}, {high:.2f}], mean t {mean_time(density, 2000):.3f}, "
        f"{share:.1f} % in the style window"
    )


def curve(density: Density) -> list[tuple[float, float]]:
    """Points of the law's probability per pixel column, scaled to the plot's height."""
    columns = (RIGHT - LEFT) * FINE
    edges = torch.linspace(LOW, HIGH, columns + 1, dtype=torch.float64)
    mass = density.cdf(edges).diff()
    heights = (mass / mass.max().clamp(min=1e-12) * (BOTTOM - TOP - 24)).tolist()
    return [(LEFT * FINE + column + 0.5, (BOTTOM - height) * FINE) for column, height in enumerate(heights)]


def _x(log_snr: float) -> float:
    return LEFT + (log_snr - LOW) / (HIGH - LOW) * (RIGHT - LEFT)


def _fine(x: float, y: float) -> tuple[float, float]:
    return x * FINE, y * FINE


def _box(draw: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, colour: str) -> None:
    draw.rectangle([_fine(left, top), _fine(right, bottom)], fill=colour)


def _write(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, anchor: str, colour: str = TEXT
) -> None:
    draw.text(_fine(x, y), text, fill=colour, font=ImageFont.load_default(size * FINE), anchor=anchor)
