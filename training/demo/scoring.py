"""How well a style was learned: by the oracle where the truth is known, by distance to the picture where not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..embedded.oracle import Oracle, score
from ..embedded.renderer import SUBJECTS, Style
from ..metrics import patches, sliced_wasserstein
from ..randomness import generator


@dataclass(frozen=True)
class Score:
    """Style and subject, each in [0, 1], averaged over the pictures."""

    style: float
    subject: float


Judge = Callable[[Tensor, list[int]], Score]  # pictures (b, 3, h, w) and the subjects asked for


def oracle_judge(oracle: Oracle, style: Style) -> Judge:
    """Style: share of the four attributes that are right. Subject: share of pictures that show it."""

    def judge(pictures: Tensor, subjects: list[int]) -> Score:
        scores = score(oracle, pictures, torch.tensor(subjects), [style] * len(subjects))
        return Score(float(scores.style_share.mean()), float(scores.subject.float().mean()))

    return judge


def picture_judge(oracle: Oracle, reference: Tensor, before: Tensor) -> Judge:
    """For a picture of the user's own, (3, h, w): how far the way from the untrained model to its texture was gone.

    1 where the sliced Wasserstein distance of 5x5 patches to the reference is zero, 0 where it is that of
    ``before`` (b, 3, h, w) or larger.
    """
    untrained = _texture_distance(before, reference)

    def judge(pictures: Tensor, subjects: list[int]) -> Score:
        style = 1 - _texture_distance(pictures, reference) / untrained
        logits = oracle(pictures)["subject"]
        right = logits.argmax(1).cpu() == torch.tensor(subjects)
        return Score(max(0.0, style), float(right.float().mean()))

    return judge


def _texture_distance(pictures: Tensor, reference: Tensor) -> float:
    points = [patches(images, 5, stride=3) for images in (pictures, reference[None])]
    return sliced_wasserstein(*points, generator(0, "texture"))


def other_subjects(shown: int) -> list[int]:
    """The subjects that the reference does not show."""
    return [i for i in range(len(SUBJECTS)) if i != shown]
