"""Several subjects in one picture: each where its box says, and nowhere else."""

import pytest
import torch

from stylewright.training.embedded.renderer import EDGES, SIZE, SUBJECTS, Style, render_together
from stylewright.training.embedded.several import MOST, draw_several, several
from stylewright.training.embedded.vocabulary import named_styles

PLAIN = Style.named("ocean", "flat", "solid", "crisp")


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_boxes_are_tight_around_what_is_drawn(count, edge):
    style = Style.named("ocean", "flat", "solid", edge)
    found = several(list(range(count)), style, torch.Generator().manual_seed(count))
    ground = found.picture[:, 0, 0][:, None, None]
    difference = (found.picture - ground).abs().amax(0)
    shown = difference > 0.5 * difference.max() if edge == "soft" else difference > 0.2 * difference.max()
    covered = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for left, top, right, bottom in found.boxes.tolist():
        inside = shown[top:bottom, left:right]
        slack = 3 if edge == "soft" else 1
        assert inside[:slack].any() and inside[-slack:].any()
        assert inside[:, :slack].any() and inside[:, -slack:].any()
        covered[max(top - slack, 0) : bottom + slack, max(left - slack, 0) : right + slack] = True
    assert not (shown & ~covered).any()


def test_a_series_has_two_to_four_different_subjects_apart():
    counts = set()
    for number in range(30):
        found = draw_several(number, PLAIN, seed=0)
        counts.add(len(found.subjects))
        assert len(set(found.subjects)) == len(found.subjects) and set(found.subjects) <= set(SUBJECTS)
        assert found.content == " and ".join(found.subjects)
        left, top, right, bottom = found.boxes.unbind(1)
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= SIZE and bottom.max() <= SIZE
        for i in range(len(left)):
            for j in range(i):
                assert right[i] <= left[j] or right[j] <= left[i] or bottom[i] <= top[j] or bottom[j] <= top[i]
    assert counts == {2, 3, MOST}


def test_the_same_number_draws_the_same_picture():
    style = next(iter(named_styles().values()))
    one, other = draw_several(5, style, seed=3), draw_several(5, style, seed=3)
    assert torch.equal(one.picture, other.picture) and one.subjects == other.subjects
    assert not torch.equal(one.picture, draw_several(5, style, seed=4).picture)
    large = draw_several(5, style, seed=3, size=2 * SIZE)
    assert (large.boxes - 2 * one.boxes).abs().max() <= 2


@pytest.mark.parametrize("subjects", [[1], [0, 1, 2, 3, 4], [3, 3]])
def test_other_numbers_of_subjects_are_refused(subjects):
    with pytest.raises(ValueError, match="2 to 4 different"):
        several(subjects, PLAIN, torch.Generator())


def test_one_subject_alone_is_the_plain_picture():
    from stylewright.training.embedded.renderer import render, scene_of

    scene = scene_of(torch.tensor([2]), PLAIN, torch.Generator().manual_seed(0))
    assert torch.equal(render_together(scene), render(scene)[0])
