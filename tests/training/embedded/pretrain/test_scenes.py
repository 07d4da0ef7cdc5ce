import pytest
import torch

from stylewright.training.embedded.pretrain.scenes import RANDOM_PALETTE, training_scenes
from stylewright.training.embedded.renderer import (
    EDGES,
    FILLS,
    HELD_OUT_STYLES,
    SEEN_GROUNDS,
    SEEN_PALETTES,
    SUBJECTS,
    colours,
    held_out_combinations,
)
from stylewright.training.embedded.vocabulary import named_styles

N = 10_000
STYLE = ("palette", "ground", "fill", "edge")


@pytest.fixture(scope="module", params=[0.0, 0.25], ids=["plain", "with named styles"])
def scenes(request):
    return training_scenes(N, 7, "test", named=request.param)


def rows(scenes):
    return torch.stack([getattr(scenes, name) for name in STYLE], 1)


def style_rows(styles):
    return torch.tensor([list(vars(style).values()) for style in styles])


def contained(rows, table):
    """True where a row (n, 4) is one of the table (m, 4)."""
    return (rows[:, None] == table).all(-1).any(1)


def test_nothing_that_is_held_out_is_ever_seen(scenes):
    named = rows(scenes)[scenes.palette >= 0]
    assert not contained(named, style_rows(held_out_combinations())).any()
    assert not contained(named, style_rows(HELD_OUT_STYLES.values())).any()
    assert scenes.palette.max() < SEEN_PALETTES
    assert scenes.ground.max() < SEEN_GROUNDS
    new = colours(torch.arange(SEEN_PALETTES, SEEN_PALETTES + 4))
    assert (scenes.colours[:, None] - new).abs().amax((-2, -1)).min() > 0.05  # not by chance either


def test_every_value_is_seen_about_equally_often():
    scenes = training_scenes(N, 7, "test")
    for name, count in zip(STYLE[1:], (SEEN_GROUNDS, len(FILLS), len(EDGES)), strict=True):
        shares = getattr(scenes, name).bincount(minlength=count) / N
        assert shares.sub(1 / count).abs().max() < 0.02 + 0.1 / count  # combinations that are held out tilt it
    assert scenes.subject.bincount(minlength=len(SUBJECTS)).div(N).sub(0.1).abs().max() < 0.01
    assert scenes.palette[scenes.palette >= 0].bincount().float().div(N).std() < 0.01


def test_the_share_of_nameless_palettes(scenes):
    nameless = scenes.palette < 0
    assert nameless.float().mean() == pytest.approx(RANDOM_PALETTE, abs=0.015)
    assert torch.equal(scenes.colours[~nameless], colours(scenes.palette[~nameless]))
    tones = scenes.colours[nameless]
    assert len(tones.flatten(1).unique(dim=0)) == len(tones)
    assert not training_scenes(50, 7, random_palette=0.0).palette.lt(0).any()
    assert training_scenes(50, 7, random_palette=1.0).palette.lt(0).all()


def test_the_share_of_named_styles():
    table = style_rows(named_styles().values())
    for share in (0.25, 0.5):
        styles = rows(training_scenes(N, 7, "test", named=share))
        by_chance = contained(rows(training_scenes(N, 7, "test")), table).float().mean()
        found = contained(styles, table).float().mean()
        expected = share + by_chance * (1 - RANDOM_PALETTE - share) / (1 - RANDOM_PALETTE)
        assert found == pytest.approx(expected.item(), abs=0.01)
        counts = (styles[:, None] == table).all(-1).sum(0)
        assert counts.min() > 0.7 * counts.float().mean()


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in (*vars(a),))


def test_scenes_are_a_function_of_seed_and_place():
    scenes = training_scenes(20, 3, "batch", 5, named=0.3)
    assert same(scenes, training_scenes(20, 3, "batch", 5, named=0.3))
    for other in (training_scenes(20, 4, "batch", 5, named=0.3), training_scenes(20, 3, "batch", 6, named=0.3)):
        assert not same(scenes, other)


def test_a_single_scene_can_always_be_drawn():
    """Of two candidates both are held out once in 250 times; then there has to be a third."""
    for seed in range(800):
        assert [len(field) for field in vars(training_scenes(1, seed)).values()] == [1] * 9
