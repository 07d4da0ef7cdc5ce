"""Distances between a prediction and its target: one number a sample, (b,), in float32.

Weightings multiply them; only the training loop takes the mean. A mask (b, 1, h, w) with values in [0, 1] makes
each sample's loss the weighted mean over its own mask, so that a small mask does not mean a small loss.
A mask of zeros has no mean: it gives NaN, which stops the run.
"""

import torch
from torch import Tensor

from .noise import wide

# Where "huber" turns from square to absolute, in units of the target, whose noise has a standard deviation of 1.
HUBER_DELTA = 1.0


def mse(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square of the difference: the loss of the papers."""
    return mean_per_sample(difference(pred, target).square(), mask)


def l1(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute difference."""
    return mean_per_sample(difference(pred, target).abs(), mask)


def huber(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Square for differences below ``HUBER_DELTA`` and linear above, where its slope equals that of the square."""
    size = difference(pred, target).abs()
    return mean_per_sample(torch.where(size < HUBER_DELTA, size.square(), HUBER_DELTA * (2 * size - HUBER_DELTA)), mask)


def difference(pred: Tensor, target: Tensor) -> Tensor:
    """pred - target in float32. ValueError where the shapes differ: broadcasting would hide a mistake."""
    if pred.shape != target.shape:
        raise ValueError(f"Got a prediction of shape {tuple(pred.shape)} for a target of shape {tuple(target.shape)}.")
    return wide(pred) - wide(target)


def mean_per_sample(errors: Tensor, mask: Tensor | None) -> Tensor:
    """errors (b, c, h, w) to (b,), weighted by mask (b, 1, h, w) where there is one."""
    if mask is None:
        return errors.flatten(1).mean(1)
    if mask.ndim != errors.ndim or mask.shape[0] != errors.shape[0] or mask.shape[2:] != errors.shape[2:]:
        expected = (errors.shape[0], 1, *errors.shape[2:])
        raise ValueError(f"Got a mask of shape {tuple(mask.shape)}: expected {expected}, the size of the latents.")
    weights = wide(mask).expand_as(errors).flatten(1)
    return (errors.flatten(1) * weights).sum(1) / weights.sum(1)


LOSSES = {"mse": mse, "l1": l1, "huber": huber}
