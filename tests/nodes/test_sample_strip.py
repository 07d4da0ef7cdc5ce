"""The strip of sample pictures: what it shows, in which order, and at what size."""

import pytest
import torch

pytestmark = pytest.mark.comfy


@pytest.fixture
def samples(tmp_path):
    """``samples(steps, size)`` writes a grey picture a prompt and step: step / 1000, and half of it."""
    from stylewright.training.loops.samples import find_samples, save_samples

    def write(steps, size=(40, 60), prompts=("a house", "a star")):
        for step in steps:
            grey = torch.tensor([step / 1000, step / 2000]).view(2, 1, 1, 1)
            save_samples(tmp_path, step, grey.expand(2, 3, *size), prompts)
        return find_samples(tmp_path, prompts, until=10_000)

    return write


def middle(strip, column, columns):
    """The colour in the middle of a column."""
    return float(strip[strip.shape[0] // 2, round((column + 0.5) * strip.shape[1] / columns), 0])


def test_a_strip_a_prompt_in_the_order_of_steps(samples):
    from stylewright.nodes.sample_strip import GAP, LINE, draw_strips

    strips = draw_strips(samples([900, 0, 300]), ["a house", "a star"], 900)
    assert strips.shape == (2, 40 + 2 * LINE, 3 * (60 + GAP) + GAP, 3)
    for index, scale in enumerate((1.0, 0.5)):
        shown = [middle(strips[index], column, 3) for column in range(3)]
        assert shown == pytest.approx([0.0, 0.3 * scale, 0.9 * scale], abs=0.01)
    assert strips[:, :LINE].min() < 0.5, "no labels"
    assert float(strips.min()) >= 0 and float(strips.max()) == 1


def test_many_steps_are_chosen_evenly_and_large_pictures_are_small(samples):
    from stylewright.nodes.sample_strip import GAP, LARGEST, MOST, draw_strips

    steps = range(0, 1000, 10)
    strips = draw_strips(samples(steps, size=(8, 1200)), ["a house", "a star"], 990)
    assert strips.shape[2] == MOST * (LARGEST + GAP) + GAP
    shown = [middle(strips[0], column, MOST) for column in range(MOST)]
    assert shown[0] == pytest.approx(0.0, abs=0.01) and shown[-1] == pytest.approx(0.99, abs=0.01)
    assert all(later - earlier == pytest.approx(0.141, abs=0.02) for earlier, later in zip(shown, shown[1:]))  # noqa: B905


def test_labels():
    from stylewright.nodes.sample_strip import label_of

    assert [label_of(step, 300) for step in (0, 50, 300)] == ["before", "step 50", "after 300 steps"]


def test_pictures_of_other_prompts_are_left_out(samples, tmp_path):
    from stylewright.training.loops.samples import find_samples, save_samples

    samples([0, 50])
    save_samples(tmp_path, 100, torch.zeros(2, 3, 4, 4), ["a house", "a ship"])
    save_samples(tmp_path, 150, torch.zeros(1, 3, 4, 4), ["a house"])
    (tmp_path / "step-000200-0.png").write_bytes(b"not a picture")
    assert list(find_samples(tmp_path, ["a house", "a star"], until=1000)) == [0, 50]
    assert list(find_samples(tmp_path, ["a house", "a ship"], until=1000)) == [100]
    assert list(find_samples(tmp_path, ["a house"], until=120)) == [0, 50, 100]
    assert find_samples(tmp_path / "nothing", ["a house"], until=9) == {}


def test_a_long_prompt_is_cut(samples):
    from stylewright.nodes.sample_strip import GAP, LINE, draw_strips

    long = "a house " * 200
    strips = draw_strips(samples([0, 10], prompts=(long, long)), [long], 10)
    words = strips[0, -LINE:]
    assert words[:, -GAP:].min() == 1 and words[:, -8 * GAP : -GAP].min() < 0.9, "not as much as fits"
