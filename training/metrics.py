"""Distances between pictures that need no network, scores of what pictures show, and means with their uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Student's t at 97.5 % for 1 to 10 degrees of freedom; beyond, the expansion below is right to 2e-4.
STUDENT_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
NORMAL_975 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, from ``n`` independent values."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float] | Tensor) -> Interval:
    """Mean of values (n,) with Student's 95 % interval; of a single value the interval is infinite."""
    sample = torch.as_tensor(values, dtype=torch.float64).flatten()
    n = len(sample)
    if n == 0:
        raise ValueError("Got no values: expected at least one to take the mean of.")
    mean = sample.mean().item()
    half = student_975(n - 1) * sample.std().item() / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, n)


def student_975(degrees: int) -> float:
    """Student's t at 97.5 %: a table, then the Cornish-Fisher expansion around the normal (Abramowitz 26.7.5)."""
    if degrees <= len(STUDENT_975):
        return STUDENT_975[degrees - 1]
    z, n = NORMAL_975, degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def harmonic_mean(a: float | Tensor, b: float | Tensor) -> Tensor:
    """2 a b / (a + b) of two scores of 0 or more, say of style and subject: high only where both are. 0 for 0 and 0.

    Style-personalisation papers report it of CLIP's text and image scores (S_harm).
    """
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if bool((a < 0).any()) or bool((b < 0).any()):
        raise ValueError(f"Got scores from {min(a.min().item(), b.min().item()):g} on: expected 0 or more.")
    total = a + b
    return torch.where(total > 0, 2 * a * b / total.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def leakage(presence: Tensor, in_reference: Tensor, named: Tensor) -> Tensor:
    """How present concepts of the reference are in pictures whose prompts do not name them: (m,), 0 is none.

    ``presence`` (b, k): of k concepts in each picture, from any classifier or :func:`similarity`. ``in_reference``
    (k,) bool: which of them the reference shows. ``named`` (b, k) bool: which of them each picture's prompt names. A
    picture's value is that of its most present concept; the pictures whose prompts name all of the reference's
    concepts, with which nothing can leak, are left out. What a model shows without the adapter is the chance level.
    """
    if presence.shape != named.shape or presence.shape[1:] != in_reference.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (presence, in_reference, named))
        raise ValueError(f"Got tensors of shapes {shapes}: expected (pictures, concepts), (concepts,) and the first.")
    uninvited = in_reference.bool() & ~named.bool()
    if not bool(uninvited.any()):
        raise ValueError("Every prompt names every concept of the reference: expected some that could leak.")
    most = presence.masked_fill(~uninvited, -math.inf).amax(1)
    return most[uninvited.any(1)]


def similarity(features: Tensor, concepts: Tensor) -> Tensor:
    """Cosines (b, k) of pictures' features (b, d) and concepts' (k, d), say CLIP's of pictures and of phrases."""
    unit = [torch.nn.functional.normalize(each.double(), dim=1) for each in (features, concepts)]
    return unit[0] @ unit[1].T


def sliced_wasserstein(a: Tensor, b: Tensor, generator: torch.Generator, *, projections: int = 128) -> float:
    """Root mean square of the 2-Wasserstein distances between projections of the points a (n, d) and b (m, d).

    Rabin et al., Wasserstein Barycenter and its Application to Texture Mixing, 2011: along each of ``projections``
    random unit directions the distance between two sets of numbers is that between their sorted values. 0 for equal
    sets whatever their order; a shift by a vector s gives |s| / sqrt(d) on average.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"Got points of shapes {tuple(a.shape)} and {tuple(b.shape)}: expected (n, d) and (m, d).")
    directions = torch.randn(a.shape[1], projections, generator=generator, device=generator.device).to(a)
    directions = directions / directions.norm(dim=0)
    count = max(len(a), len(b))
    gaps = sorted_values(a @ directions, count) - sorted_values(b @ directions, count)
    return gaps.square().mean().sqrt().item()


def sorted_values(projected: Tensor, count: int) -> Tensor:
    """Columns of (n, p) sorted, and their empirical quantiles taken at ``count`` even shares: (count, p)."""
    shares = (torch.arange(count, device=projected.device, dtype=torch.float64) + 0.5) / count
    return projected.sort(dim=0).values[(shares * len(projected)).long()]


def pixels(images: Tensor) -> Tensor:
    """Images (b, c, h, w) as points (b * h * w, c): their palette."""
    return images.movedim(1, -1).flatten(0, 2)


def patches(images: Tensor, size: int, *, stride: int = 1) -> Tensor:
    """Images (b, c, h, w) as points (n, c * size^2), one a square of ``size`` pixels: their texture."""
    if size > min(images.shape[2:]):
        raise ValueError(f"Got patches of {size} pixels from images of {images.shape[2]}x{images.shape[3]}.")
    return torch.nn.functional.unfold(images, size, stride=stride).movedim(1, 2).flatten(0, 1)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared distance between the laws of the features a (n, d) and b (m, d): KID, without bias, so below 0 at times.

    Binkowski et al., Demystifying MMD GANs, arXiv 1801.01401: the maximum mean discrepancy of the kernel
    (x y / d + 1)^3, which sees the first three moments.
    """
    _require_points(a, b, least=2)
    a, b = a.double(), b.double()
    within = [_kernel(x, x).fill_diagonal_(0).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return (within[0] + within[1] - 2 * _kernel(a, b).mean()).item()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def recall(real: Tensor, drawn: Tensor, *, k: int = 3) -> float:
    """Share of the features real (n, d) that lie no further from one of drawn (m, d) than its k-th neighbour there.

    Kynkaanniemi et al., Improved Precision and Recall Metric, arXiv 1904.06991: how much of the real pictures' variety
    the drawn ones have. Swapped it is their precision. It grows with m: compare equal numbers.
    """
    _require_points(real, drawn, least=k + 1)
    reach = torch.cdist(drawn, drawn).kthvalue(k + 1, dim=1).values  # its first neighbour is itself
    return (torch.cdist(real, drawn) <= reach).any(1).double().mean().item()


def _require_points(a: Tensor, b: Tensor, *, least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(
            f"Got points of shapes {tuple(a.shape)} and {tuple(b.shape)}: expected (n, d) and (m, d), at least {least}."
        )
