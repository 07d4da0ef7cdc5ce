"""Guidance by four predictions: of a model with an adapter and without it, for a prompt and for a null prompt.

Written hatted with the adapter, d^(c) and d^(0), and plain without it, d(c) and d(0). Every rule below is a weighted
sum of them whose weights sum to 1. At one x_t and noise level the data, the noise and the velocity are affine in each
other, so a rule means the same whichever of them is predicted.

CFG         d^(c) + (s - 1) (d^(c) - d^(0))                                 of the adapted model, at scale s
FineStyle   d^(c) + l1 (d^(c) - d(c)) + l2 (d^(c) - d^(0))                  (NeurIPS 2024; l1 style, l2 semantics)
StyleDrop   d^(c) + lA (d^(c) - d(c)) + lB (d(c) - d(0))                    (arXiv 2306.00983)
DCO         d(0) + wt (d(c) - d(0)) + wc (d^(c) - d(c))                     (arXiv 2402.12004: consistency guidance)

FineStyle and StyleDrop were published for logits of a masked transformer; that they carry over to diffusion is ours to
show. What Direct Consistency Optimization calls consistency guidance is StyleDrop's rule with lA = wc - 1 and
lB = wt - 1. FineStyle differs from it by l2 ((d^(c) - d^(0)) - (d(c) - d(0))) alone: whose answer to the prompt is
strengthened.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Of the four predictions, in their order; they sum to 1."""

    adapted: float
    adapted_null: float
    base: float
    base_null: float


@dataclass(frozen=True)
class Guidance:
    """Two scales, each of a difference that is added to d^(c).

    style: of d^(c) - d(c), what the adapter changes. text: of what the prompt changes, in the adapted model or, where
    ``of_base``, in the base.
    """

    style: float = 0.0
    text: float = 0.0
    of_base: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.style) and math.isfinite(self.text)):
            raise ValueError(f"the scales are {self.style:g} and {self.text:g}: expected finite numbers")

    def times(self, style: float, text: float) -> "Guidance":
        """With a factor on each scale: how much of it acts at a noise level."""
        return replace(self, style=self.style * style, text=self.text * text)

    @property
    def weights(self) -> Weights:
        """A prediction of weight 0 need not be made."""
        adapted, base = (0.0, self.text) if self.of_base else (self.text, 0.0)
        return Weights(1 + self.style + adapted, -adapted, base - self.style, -base)

    @property
    def added_style(self) -> float:
        """Of d^(c) - d(c), on top of CFG at scale 1 + text in the model whose text is strengthened."""
        return self.style + self.of_base


def combined(weights: Weights, predictions: Sequence[Tensor | None]) -> Tensor:
    """The weighted sum of the four (b, c, h, w) in the order of ``weights``. What has weight 0 may be None."""
    parts = [weight * each for weight, each in zip(weights, predictions, strict=True) if weight and each is not None]
    return sum(parts[1:], start=parts[0])


def cfg(scale: float) -> Guidance:
    """Classifier-free guidance of the adapted model (arXiv 2207.12598); 1 is the model alone."""
    return Guidance(text=scale - 1)


def finestyle(lambda_1: float, lambda_2: float) -> Guidance:
    """FineStyle: both the prompt and the null prompt of the second term go through the adapted model."""
    return Guidance(lambda_1, lambda_2)


def styledrop(lambda_a: float, lambda_b: float) -> Guidance:
    """StyleDrop: the second term is the base's alone."""
    return Guidance(lambda_a, lambda_b, of_base=True)


def consistency(w_text: float, w_consistency: float) -> Guidance:
    """Direct Consistency Optimization's: the base under CFG, and ``w_consistency`` of what the adapter changes."""
    return styledrop(w_consistency - 1, w_text - 1)


RULES: dict[str, Callable[..., Guidance]] = {
    "FineStyle": finestyle,
    "CFG": cfg,
    "StyleDrop": styledrop,
    "DCO consistency": consistency,
}
