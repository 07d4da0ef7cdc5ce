"""Distances between a prediction and its target: one number a sample, (b,), in float32.

Weightings multiply them; only the training loop takes the mean. A mask (b, 1, h, w) with values in [0, 1] makes
each sample's loss the weighted mean over its own mask, so that a small mask does not mean a small loss.
A mask of zeros has no mean: it gives NaN, which stops the run.

Those of ``LOSSES`` compare a prediction with its target. ``DCO`` also needs what the model says without its adapter.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .noise import wide

# Where "huber" turns from square to absolute, in units of the target, whose noise has a standard deviation of 1.
HUBER_DELTA = 1.0

DCO = "dco"
# For means over a sample's elements: what the authors train SDXL with (github.com/kyungmnlee/dco), and what
# arXiv 2411.14793 takes for FLUX and SD3.5, where 1000 was slow and weak.
DCO_BETA, DCO_BETA_FLOW = 1000.0, 1.0


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


def direct_consistency(
    pred: Tensor, target: Tensor, base: Tensor, beta: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Direct Consistency Optimization (arXiv 2402.12004): -log sigmoid(-beta (mse(pred) - mse(base))), (b,).

    ``base``: what the model without its adapter predicts of the same x_t and noise, of pred's shape; no gradient goes
    into it. ``beta``, a number or (b,), is for means over a sample's elements, not for sums; the difference is taken
    sample by sample. With pred = base the loss is log 2, and its gradient is beta / 2 times that of ``mse``; below
    log 2 it is where the adapter does better than the base, and there beta says how soon it has learned enough.
    """
    gain = mse(pred, target, mask) - mse(base.detach(), target, mask)
    return softplus(beta * gain)


def dco_beta(process: str) -> float:
    """The beta that is published for such a model."""
    return DCO_BETA_FLOW if process == "flow" else DCO_BETA


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
CHOICES = (*LOSSES, DCO)
