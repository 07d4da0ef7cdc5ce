"""A window of noise levels: where something acts, and how much."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .densities import STYLE_WINDOW
from .noise import resolution_shift, wide


@dataclass(frozen=True)
class Window:
    """1 between two values of log_snr, ``outside`` beyond them, and a straight line of width ``edge`` at each end.

    The line is centred on the end. ``reference_tokens``: the window is stated for pictures of so many image tokens, and
    :meth:`carried` to others; None = for any.
    """

    low: float = -math.inf
    high: float = math.inf
    edge: float = 0.0
    outside: float = 0.0
    reference_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"the window of noise levels is from {self.low:g} to {self.high:g} in log_snr: expected the noisier, "
                "smaller number first"
            )
        if not 0 <= self.edge < math.inf:
            raise ValueError(f"the edge of the window is {self.edge:g} wide: expected 0 or more")

    def carried(self, tokens: int) -> "Window":
        """The window for pictures of ``tokens`` image tokens."""
        if self.reference_tokens is None:
            return self
        moved = resolution_shift(tokens, self.reference_tokens)
        return replace(self, low=self.low + moved, high=self.high + moved, reference_tokens=None)

    def strength(self, log_snr: Tensor) -> Tensor:
        """How much acts (b,) at log_snr (b,); -inf is pure noise, and inside of a window without a low end."""
        log_snr = wide(log_snr)
        inside = torch.ones_like(log_snr)
        if self.low > -math.inf:
            inside = inside * self._rise(log_snr - self.low, closed=True)
        if self.high < math.inf:
            inside = inside * self._rise(self.high - log_snr, closed=False)
        return self.outside + (1 - self.outside) * inside

    def _rise(self, distance: Tensor, closed: bool) -> Tensor:
        if self.edge:
            return (distance / self.edge + 0.5).clamp(0, 1)
        return ((distance >= 0) if closed else (distance > 0)).to(distance)

    def reaches(self, lowest: float, highest: float) -> bool:
        """Whether any noise level from ``lowest`` to ``highest`` is in it."""
        return self.low - self.edge / 2 <= highest and lowest < self.high + self.edge / 2


def style_window(reference_tokens: int | None) -> Window:
    """Where style is made: below log_snr -6.52 at 1024x1024 (arXiv 2411.14793v3, Fig. 4)."""
    return Window(high=STYLE_WINDOW, reference_tokens=reference_tokens)
