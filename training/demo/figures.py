"""The demo's plots and picture strips."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..densities import Density
from ..noise import time_of_log_snr

COLOURS = ("#d1495b", "#2e6f95", "#8d99ae", "#66a182")


def save_strip(path: Path, pictures: Tensor, scale: int = 1) -> None:
    """Pictures (b, 3, h, w) in [0, 1] side by side, as PNG."""
    from PIL import Image

    row = torch.cat(list(pictures.clamp(0, 1)), 2)
    image = Image.fromarray((row.movedim(0, -1) * 255).round().byte().cpu().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def plot_densities(path: Path, laws: Mapping[str, Density]) -> None:
    """Density of each law over log_snr, with flow time along the top."""
    figure, axes = _figure()
    levels = torch.linspace(-14, 10, 400, dtype=torch.float64)
    step = levels[1] - levels[0]
    for (name, law), colour in zip(laws.items(), COLOURS, strict=False):
        mass = law.cdf(levels + step / 2) - law.cdf(levels - step / 2)
        axes.plot(levels, mass / step, label=name, color=colour)
        axes.fill_between(levels, mass / step, alpha=0.15, color=colour)
    axes.set(xlabel="log_snr (noise on the left, data on the right)", ylabel="density", ylim=(0, None))
    ticks = torch.tensor([-12.0, -8.0, -4.0, 0.0, 4.0, 8.0])
    top = axes.secondary_xaxis("top")
    top.set_xticks(ticks.tolist(), [f"t = {t:.3f}" for t in time_of_log_snr(ticks).tolist()], fontsize=7)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_curves(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], labels: tuple[str, str]) -> None:
    """One line a law through its points (x, y); ``labels`` name the axes."""
    figure, axes = _figure()
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(*zip(*points, strict=True), label=name, color=colour, marker="o", markersize=3)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(frameon=False)
    _save(figure, path)


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
