"""Pictures have the properties that their words name."""

import math
from dataclasses import replace

import pytest
import torch

from stylewright.training.embedded.outlines import outlines
from stylewright.training.embedded.pretrain.oracle import any_scene
from stylewright.training.embedded.renderer import (
    EDGES,
    FILLS,
    GROUNDS,
    HELD_OUT_STYLES,
    PALETTES,
    SEEN_GROUNDS,
    SEEN_PALETTES,
    SIZE,
    SUBJECTS,
    Scene,
    Style,
    colours,
    held_out_combinations,
    is_held_out,
    pose,
    random_colours,
    render,
    scene_of,
)

PIXEL = 2 / SIZE
FAR = (50.0, 50.0)  # where a subject does not show
PRIMARIES = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 1.0]])  # ground, ground, figure, figure


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(subject="circle", ground="flat", fill="solid", edge="crisp", *, centre=(0.0, 0.0), scale=0.6, angle=0.0):
    """One picture (3, 128, 128) in red and green (ground), blue and white (figure)."""
    index = [SUBJECTS.index(subject), 0, GROUNDS.index(ground), FILLS.index(fill), EDGES.index(edge)]
    rows = [torch.tensor([value]) for value in index]
    where = torch.tensor([centre]), torch.tensor([scale]), torch.tensor([angle])
    return render(Scene(*rows, PRIMARIES[None], *where))[0]


def pattern(ground):
    """Share of the second ground colour, (128, 128), checked to be a blend of the two and nothing else."""
    red, green, blue = picture(ground=ground, centre=FAR)
    torch.testing.assert_close(red + green, torch.ones_like(red))
    assert not blue.any()
    return green


def coverage(**options):
    """Share of each pixel that a solid subject covers, (128, 128)."""
    return picture(**options)[2]


def axis():
    return (torch.arange(SIZE) + 0.5) * PIXEL - 1


# ---- what a scene is


def test_every_attribute_gives_colours_in_range():
    scene = any_scene(60, 3)
    pictures = render(scene, 96)
    assert pictures.shape == (60, 3, 96, 96) and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert all(getattr(scene, name).unique().numel() > 2 for name in ("subject", "palette", "ground", "fill", "edge"))


def test_a_picture_does_not_depend_on_those_beside_it():
    scene = any_scene(7, 4)
    together = render(scene)
    for i in range(len(scene)):
        assert torch.equal(render(scene[i : i + 1])[0], together[i])
    assert torch.equal(render(scene[torch.tensor([5, 2])]), together[[5, 2]])


def test_resolution_changes_the_sharpness_alone():
    scene = scene_of(torch.arange(10), HELD_OUT_STYLES["glacier"], draw())
    coarse = torch.nn.functional.avg_pool2d(render(scene, 256), 2)
    assert (render(scene, 128) - coarse).abs().mean() < 0.01


def test_styles_are_their_words():
    for style in (*HELD_OUT_STYLES.values(), *held_out_combinations()):
        assert Style.named(*style.words) == style
    with pytest.raises(ValueError, match="not in"):
        Style.named("ocean", "plaid", "solid", "crisp")


def test_named_palettes_are_their_hexadecimal_colours():
    table = colours(torch.arange(len(PALETTES)))
    for four, codes in zip((table * 255).round().int().tolist(), PALETTES.values(), strict=True):
        assert ["#" + bytes(colour).hex() for colour in four] == list(codes)


def test_scene_of_draws_poses_for_one_style():
    style, subjects = HELD_OUT_STYLES["twilight"], torch.tensor([3, 3, 8])
    scene = scene_of(subjects, style, draw())
    assert torch.equal(scene.subject, subjects)
    assert {tuple(row) for row in zip(scene.palette.tolist(), scene.ground.tolist(), strict=True)} == {(15, 6)}
    assert torch.equal(scene.colours, colours(scene.palette))
    assert scene.scale.unique().numel() == 3  # the same subject twice, not the same picture
    again = scene_of(subjects, style, draw())
    assert torch.equal(render(again), render(scene))


# ---- what pre-training may not see


def test_held_out_styles_are_new_in_the_way_they_say():
    styles = list(HELD_OUT_STYLES.values())
    assert len(set(styles)) == len(styles)
    for style in styles[:4]:
        assert style in held_out_combinations()
    for style in styles[4:]:
        assert style.palette >= SEEN_PALETTES
    assert [style.ground >= SEEN_GROUNDS for style in styles] == [False] * 7 + [True]


def test_held_out_combinations_are_what_is_held_out_and_about_six_percent():
    combinations = held_out_combinations()
    total = SEEN_PALETTES * SEEN_GROUNDS * len(FILLS) * len(EDGES)
    assert 0.05 < len(combinations) / total < 0.08
    assert len(set(combinations)) == len(combinations)
    assert all(style.palette < SEEN_PALETTES and style.ground < SEEN_GROUNDS for style in combinations)
    columns = [torch.tensor(column) for column in zip(*(vars(style).values() for style in combinations), strict=True)]
    assert is_held_out(*columns).all()


def test_every_seen_value_is_seen_somewhere():
    """Holding combinations out never takes a whole value away, nor any two values together."""
    counts = (SEEN_PALETTES, SEEN_GROUNDS, len(FILLS), len(EDGES))
    grid = torch.cartesian_prod(*(torch.arange(n) for n in counts))
    seen = grid[~is_held_out(*grid.unbind(1))]
    for i in range(4):
        for j in range(i):
            assert len(seen[:, [i, j]].unique(dim=0)) == counts[i] * counts[j]


# ---- grounds


def test_flat_is_one_colour():
    assert not pattern("flat").any()


def test_stripes_are_constant_along_x_and_repeat_along_y():
    share = pattern("stripes")
    assert (share == share[:, :1]).all()
    assert torch.allclose(share, share.roll(SIZE // 4, 0), atol=1e-4)
    assert torch.allclose(share, 1 - share.roll(SIZE // 8, 0), atol=1e-4)
    assert share.mean() == pytest.approx(0.5, abs=1e-3)


def test_diagonal_stripes_are_constant_along_one_diagonal():
    share = pattern("diagonal")
    assert torch.allclose(share[1:, :-1], share[:-1, 1:], atol=1e-4)
    assert (share[1:, 1:] - share[:-1, :-1]).abs().max() > 0.5
    assert share.mean() == pytest.approx(0.5, abs=0.03)


def test_the_checker_is_symmetric_and_changes_sides():
    share = pattern("checker")
    for same in (share.T, share.flip(0), share.flip(1)):
        assert torch.allclose(share, same, atol=1e-4)
    assert torch.allclose(share.roll(SIZE // 4, 0), 1 - share, atol=1e-4)
    assert ((share < 0.01) | (share > 0.99)).float().mean() > 0.9


def test_the_sunset_goes_evenly_from_one_colour_to_the_other():
    share = pattern("sunset")
    torch.testing.assert_close(share, ((axis() + 1) / 2)[:, None].expand(SIZE, SIZE))


def test_dots_are_round_and_on_a_grid():
    share = pattern("dots")
    for same in (share.roll(SIZE // 4, 0), share.roll(SIZE // 4, 1), share.T, share.flip(0)):
        assert torch.allclose(share, same, atol=1e-4)
    assert share.mean() == pytest.approx(math.pi * 0.13**2 / 0.5**2, rel=0.01)


def test_waves_are_stripes_that_move_up_and_down():
    share = pattern("waves")
    middle = share[:, [SIZE // 2 - 1, SIZE // 2]].mean(1, keepdim=True)
    assert (pattern("stripes")[:, :1] - middle).abs().max() < 0.35  # sin(0) = 0
    assert torch.allclose(share, share.roll(SIZE // 2, 1), atol=1e-3)
    assert torch.allclose(share, share.roll(SIZE // 4, 0), atol=1e-3)
    assert (share - share[:, :1]).abs().max() == 1
    assert share.mean(0).sub(0.5).abs().max() < 0.01  # each column is half and half, as in stripes


# ---- fills, on a large circle


def inner():
    """Pixels well inside a circle of scale 0.9."""
    return torch.hypot(axis()[None], axis()[:, None]) < 0.7


def test_solid_is_one_colour():
    blue = picture(scale=0.9)
    assert (blue[:, inner()] == PRIMARIES[2][:, None]).all()


def test_hatching_runs_along_the_other_diagonal():
    share = picture(fill="hatched", scale=0.9)[0] * inner()  # red tells white from blue
    both = inner()[1:, 1:] & inner()[:-1, :-1]
    assert (share[1:, 1:] - share[:-1, :-1])[both].abs().max() < 1e-4
    assert share[inner()].mean() == pytest.approx(0.5, abs=0.05)
    assert share.max() == 1


def test_shading_goes_from_the_top_of_the_subject_to_its_bottom():
    share = picture(fill="shaded", scale=0.9)[0]
    expected = (axis()[:, None] / 0.9 + 1) / 2
    torch.testing.assert_close(share[inner()], expected.expand(SIZE, SIZE)[inner()])


def test_an_outline_is_a_line_inside_the_edge():
    radius, line = 0.9 * 0.88, 2 * 0.085
    blue = picture(fill="outline", scale=0.9)[2]
    distance = torch.hypot(axis()[None], axis()[:, None]) - radius
    assert blue[(distance < -PIXEL) & (distance > PIXEL - line)].min() == 1
    assert not blue[(distance > 2 * PIXEL) | (distance < -line - 2 * PIXEL)].any()


# ---- edges


def test_a_crisp_edge_is_a_pixel_wide_and_a_soft_one_fourteen():
    widths = {}
    for edge in ("crisp", "soft"):
        row = coverage(edge=edge, scale=0.8)[SIZE // 2, SIZE // 2 :]
        assert (row.diff() <= 0).all() and row[0] == 1 and row[-1] == 0
        widths[edge] = 1 / row.diff().abs().max().item()
    assert widths["crisp"] < 1.6
    assert widths["soft"] == pytest.approx(14, rel=0.05)
    crisp, soft = coverage(scale=0.8), coverage(scale=0.8, edge="soft")
    assert soft.mean() == pytest.approx(crisp.mean().item(), rel=0.02)  # the edge stays where it is


def test_ink_follows_the_edge_and_is_near_black():
    drawn, plain = picture(edge="inked", scale=0.8), picture(scale=0.8)
    distance = torch.hypot(axis()[None], axis()[:, None]) - 0.8 * 0.88
    on_line, elsewhere = distance.abs() < 0.035 - PIXEL, distance.abs() > 0.035 + 2 * PIXEL
    assert (drawn[:, on_line] == 0.06).all()
    assert torch.equal(drawn[:, elsewhere], plain[:, elsewhere])


# ---- subjects and poses


def area_and_centroid(vertices):
    """Of a simple polygon (m, 2), by the shoelace formulas."""
    (x, y), (after_x, after_y) = vertices.T.double(), vertices.roll(-1, 0).T.double()
    cross = x * after_y - after_x * y
    middle = torch.stack([((x + after_x) * cross).sum(), ((y + after_y) * cross).sum()]) / (3 * cross.sum())
    return cross.sum().abs().item() / 2, middle.float()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_area_goes_with_the_square_of_the_scale(subject):
    area, _ = area_and_centroid(outlines()[subject])
    for scale in (0.3, 0.56, 0.74):
        assert coverage(subject=subject, scale=scale).mean() * 4 == pytest.approx(area * scale**2, rel=0.01)


@pytest.mark.parametrize("subject", ["arrow", "crescent", "house"])
def test_a_pose_turns_clockwise_and_moves(subject):
    _, middle = area_and_centroid(outlines()[subject])
    angle, centre, scale = 0.7, torch.tensor([0.12, -0.07]), 0.5
    drawn = coverage(subject=subject, scale=scale, angle=angle, centre=tuple(centre.tolist()))
    found = torch.stack([(drawn * axis()[None]).sum(), (drawn * axis()[:, None]).sum()]) / drawn.sum()
    cos, sin = math.cos(angle), math.sin(angle)
    expected = centre + scale * torch.tensor([[cos, -sin], [sin, cos]]) @ middle
    torch.testing.assert_close(found, expected, atol=0.005, rtol=0)


def test_subjects_stay_on_the_canvas():
    n = 300
    subject = torch.arange(n) % len(SUBJECTS)
    scene = scene_of(subject, Style.named("ocean", "flat", "solid", "crisp"), draw())
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    at_border = render(replace(scene, colours=PRIMARIES.expand(n, 4, 3)))[:, :, border]
    assert (at_border == PRIMARIES[0].view(1, 3, 1)).all()


def test_poses_cover_their_ranges():
    centre, scale, angle = pose(5000, draw())
    ranges = {0.15: centre, math.radians(14): angle, 0.09: scale - 0.65}
    for limit, values in ranges.items():
        assert values.abs().max() <= limit + 1e-6
        assert values.min() < -0.98 * limit and values.max() > 0.98 * limit
        assert values.mean().abs() < 0.05 * limit


def test_random_palettes_are_legible_and_never_the_same():
    n = 2000
    four = random_colours(n, draw())
    assert four.shape == (n, 4, 3) and four.min() >= 0 and four.max() <= 1
    assert torch.equal(four, random_colours(n, draw()))
    assert len(four.flatten(1).unique(dim=0)) == n
    contrast = torch.cdist(four[:, :2], four[:, 2:]).amin((1, 2))
    anyhow = torch.rand(n, 4, 3, generator=draw(1))
    assert contrast.mean() > 1.3 * torch.cdist(anyhow[:, :2], anyhow[:, 2:]).amin((1, 2)).mean()
    assert (four[:, 0] - four[:, 1]).norm(dim=1).mean() < (anyhow[:, 0] - anyhow[:, 1]).norm(dim=1).mean()
