import pytest
import torch
from torch import nn

from stylewright.training.demo.scoring import oracle_judge, other_subjects, picture_judge
from stylewright.training.embedded.oracle import HEADS
from stylewright.training.embedded.renderer import SUBJECTS, Style


class Reading(nn.Module):
    """An oracle that always sees these attributes, in the order of HEADS, one row a picture."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, pictures):
        columns = self.rows[: len(pictures)].unbind(1)
        return {
            name: nn.functional.one_hot(column, classes).float()
            for (name, classes), column in zip(HEADS.items(), columns, strict=True)
        }


def textures(n, frequency, seed=0):
    """Pictures (n, 3, 40, 56) of one texture: stripes of this frequency at random phases, and noise."""
    draw = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(n, 1, 1, 1, generator=draw)
    stripes = torch.sin(frequency * torch.arange(56.0) + phase).expand(n, 3, 40, 56)
    return (0.5 + 0.3 * stripes + 0.1 * torch.randn(n, 3, 40, 56, generator=draw)).clamp(0, 1)


def test_the_oracles_scores_are_averaged_over_pictures():
    judge = oracle_judge(Reading((3, 5, 2, 1, 0), (4, 5, 2, 0, 0), (5, 0, 1, 0, 0)), Style(5, 2, 1, 0))
    result = judge(torch.zeros(3, 3, 128, 128), [3, 4, 0])
    assert result.subject == pytest.approx(2 / 3)
    assert result.style == pytest.approx((1 + 0.75 + 0.25) / 3)


def test_the_way_to_a_picture_is_from_nothing_to_all_of_it():
    before, reference = textures(5, 0.2), textures(1, 0.9, seed=1)[0]
    judge = picture_judge(Reading(*[(2, 0, 0, 0, 0)] * 5), reference, before)
    assert judge(before, [2, 2, 2, 2, 1]).style == pytest.approx(0, abs=1e-6)
    assert judge(before, [2, 2, 2, 2, 1]).subject == pytest.approx(0.8)
    assert judge(reference.expand(5, -1, -1, -1), [2] * 5).style == pytest.approx(1, abs=1e-4)
    scores = [judge(torch.lerp(before, textures(5, 0.9, seed=2), share), [2] * 5).style for share in (0.3, 0.6, 1.0)]
    assert 0 < scores[0] < scores[1] < scores[2] < 1
    assert scores[2] > 0.6


def test_a_picture_that_is_further_away_than_before_scores_nothing():
    before, reference = textures(4, 0.2), textures(1, 0.3, seed=1)[0]
    judge = picture_judge(Reading(*[(2, 0, 0, 0, 0)] * 4), reference, before)
    assert judge((textures(4, 3.0) > 0.5).float(), [2] * 4).style == 0


def test_it_is_the_texture_that_counts_and_not_where_it_is():
    before, reference = textures(5, 0.2), textures(1, 0.9, seed=1)[0]
    judge = picture_judge(Reading(*[(2, 0, 0, 0, 0)] * 5), reference, before)
    moved = torch.stack([reference.roll(7 * i, -1) for i in range(5)])
    assert judge(moved, [2] * 5).style > 0.85


def test_other_subjects_are_all_but_the_one_that_is_shown():
    for shown in range(len(SUBJECTS)):
        assert sorted([*other_subjects(shown), shown]) == list(range(len(SUBJECTS)))
