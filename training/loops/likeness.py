"""How alike the student's pictures and their prompts are, as a part of its loss (SwiftBrush v2, arXiv 2408.14176).

Distribution matching asks for the teacher's pictures, with whatever they lack of the prompt. A picture that features
find too far from its text is moved towards it, and one that is near enough, above a threshold of the cosine, is not:
without the threshold pictures become blurred and garish. The weight falls to 0 over the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..distillation import annealed, clamped_similarity_loss
from ..hosts.host import Features
from .distil_config import DistilConfig


@dataclass(frozen=True)
class Likeness:
    """Both with gradients."""

    decode: Callable[[Tensor], Tensor]  # latents (b, c, h, w) -> pictures (b, 3, h', w') in [0, 1]
    features: Features


@dataclass(frozen=True)
class Unlikeness:
    """Of a pass."""

    losses: Tensor  # (b,), weighted, 0 of the samples that were not looked at
    cosine: Tensor  # () mean of those that were


def looked_at(config: DistilConfig, rows: slice) -> list[int]:
    """Which samples of a pass are decoded: the first ``clip_samples`` of each of the step's batches.

    ``rows``: of the step's samples, which are the pass's. The same samples however they are dealt out to passes.
    """
    most = config.clip_samples or config.batch_size
    return [place for place, row in enumerate(range(rows.start, rows.stop)) if row % config.batch_size < most]


def unlikeness(
    likeness: Likeness, config: DistilConfig, step: int, x0: Tensor, prompts: Sequence[str], rows: slice
) -> Unlikeness | None:
    """Of x0 (b, c, h, w), the pass's samples with their prompts; None where none of them is looked at.

    Losses are weighted such that the mean over a whole step is the mean over the samples looked at.
    """
    chosen = looked_at(config, rows)
    if not chosen:
        return None
    pictures = likeness.features.pictures(likeness.decode(x0[chosen]))
    with torch.no_grad():
        texts = likeness.features.texts([prompts[place] for place in chosen]).to(pictures)
    weight = annealed(config.clip_weight, step, config.steps)
    weight *= config.batch_size / (config.clip_samples or config.batch_size)
    losses = clamped_similarity_loss(pictures, texts, config.clip_threshold)
    spread = losses.new_zeros(len(x0)).index_put((torch.tensor(chosen, device=losses.device),), weight * losses)
    return Unlikeness(spread, cosine_similarity(pictures, texts).mean().detach())
