import math

import pytest
import torch
from scipy import stats

from stylewright.training import metrics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n, d, seed=1):
    return torch.randn(n, d, generator=generator(seed))


def test_equal_sets_have_no_distance_whatever_their_order():
    a = points(500, 7)
    assert metrics.sliced_wasserstein(a, a.flip(0), generator()) == 0


def test_a_shift_shows_with_its_length():
    """The projections of a shift s have mean square |s|^2 / d."""
    a, shift = points(400, 3), torch.tensor([3.0, -4.0, 12.0])
    distance = metrics.sliced_wasserstein(a, a + shift, generator(), projections=4000)
    assert distance == pytest.approx(13 / math.sqrt(3), rel=0.03)
    assert metrics.sliced_wasserstein(a + shift, a, generator(), projections=4000) == pytest.approx(distance)


def test_gaussians_are_apart_by_their_closed_form():
    """W2(N(m, s^2), N(m', s'^2))^2 = (m - m')^2 + (s - s')^2 along each direction; sets of different size."""
    a, b = 2 * points(30_000, 1, seed=1) + 1, 0.5 * points(20_000, 1, seed=2) - 1
    assert metrics.sliced_wasserstein(a, b, generator()) == pytest.approx(math.hypot(2, 1.5), rel=0.02)


def test_a_set_repeated_is_the_same_law():
    a = points(101, 4)
    assert metrics.sliced_wasserstein(a, a.repeat(3, 1), generator()) == 0


def test_the_directions_are_the_generators():
    a, b = points(50, 5, seed=1), points(60, 5, seed=2)
    first, again, other = (metrics.sliced_wasserstein(a, b, generator(seed), projections=4) for seed in (0, 0, 1))
    assert first == again != other


def test_points_must_agree():
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
        metrics.sliced_wasserstein(points(5, 3), points(5, 4), generator())


def test_pixels_are_the_palette():
    images = torch.rand(2, 3, 4, 5, generator=generator())
    palette = metrics.pixels(images)
    assert palette.shape == (40, 3) and torch.equal(palette[20 + 2 * 5 + 1], images[1, :, 2, 1])


def test_patches_are_squares():
    images = torch.rand(2, 3, 6, 7, generator=generator())
    squares = metrics.patches(images, 2, stride=2)
    assert squares.shape == (2 * 3 * 3, 12)
    assert torch.equal(squares[9 + 1 * 3 + 2], images[1, :, 2:4, 4:6].flatten())
    assert metrics.patches(images, 3).shape == (2 * 4 * 5, 27)
    with pytest.raises(ValueError, match="7 pixels from images of 6x7"):
        metrics.patches(images, 7)


@pytest.mark.parametrize("degrees", [1, 2, 5, 10, 11, 15, 30, 200])
def test_students_quantile(degrees):
    assert metrics.student_975(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=2e-4)


def test_interval_is_scipys_and_covers_as_promised():
    values = torch.tensor([0.3, 0.5, 0.9, 0.4, 0.8])
    interval = metrics.mean_interval(values)
    exact = stats.t.interval(0.95, 4, values.mean().item(), stats.sem(values.numpy()))
    assert (interval.low, interval.high) == pytest.approx(exact, abs=1e-4)
    assert interval.mean == pytest.approx(0.58) and interval.n == 5
    trials = torch.randn(2000, 6, generator=generator()) + 3
    covered = sum(i.low < 3 < i.high for i in map(metrics.mean_interval, trials))
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_intervals_of_few_values():
    single = metrics.mean_interval([0.5])
    assert (single.mean, single.low, single.high) == (0.5, -math.inf, math.inf)
    assert metrics.mean_interval([0.5, 0.5]).low == 0.5
    with pytest.raises(ValueError, match="no values"):
        metrics.mean_interval([])


@pytest.mark.parametrize(
    ("text", "image", "harmonic"),
    [  # S_txt, S_img and S_harm as "Training-Free Style-Personalization via SVD-Based Feature Decomposition" has them
        (0.334, 0.630, 0.437), (0.302, 0.763, 0.433), (0.315, 0.716, 0.438), (0.273, 0.657, 0.386),
        (0.304, 0.599, 0.403), (0.323, 0.602, 0.420), (0.324, 0.559, 0.410), (0.318, 0.623, 0.421),
        (0.314, 0.701, 0.434),
    ],
)  # fmt: skip
def test_the_harmonic_mean_is_the_published_one(text, image, harmonic):
    """Of rounded scores: half a unit in the last place of each moves it by as much as 0.0006."""
    assert metrics.harmonic_mean(text, image).item() == pytest.approx(harmonic, abs=1.1e-3)


def test_the_harmonic_mean_of_tensors_and_of_nothing():
    means = metrics.harmonic_mean(torch.tensor([0.0, 0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 0.5, 0.5]))
    assert means.tolist() == pytest.approx([0, 0, 0.5, 2 / 3])
    with pytest.raises(ValueError, match=r"-0\.1"):
        metrics.harmonic_mean(0.3, -0.1)


def test_leakage_is_of_the_reference_s_concepts_that_were_not_asked_for():
    presence = torch.tensor([[0.9, 0.2, 0.7], [0.8, 0.1, 0.6], [0.3, 0.4, 0.9], [0.5, 0.5, 0.5]])
    in_reference = torch.tensor([True, True, False])
    named = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 1, 0]]).bool()
    assert metrics.leakage(presence, in_reference, named).tolist() == pytest.approx([0.2, 0.8, 0.4])


def test_leakage_needs_something_that_could_leak():
    with pytest.raises(ValueError, match="names every concept"):
        metrics.leakage(torch.rand(2, 3), torch.tensor([True, False, False]), torch.tensor([[1, 0, 0]] * 2).bool())
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2,\), \(2, 3\)"):
        metrics.leakage(torch.rand(2, 3), torch.ones(2).bool(), torch.zeros(2, 3).bool())


def test_similarity_is_the_cosine():
    features, concepts = points(4, 6, seed=1), points(3, 6, seed=2)
    expected = torch.nn.functional.cosine_similarity(features[:, None], concepts, dim=2)
    torch.testing.assert_close(metrics.similarity(5 * features, concepts), expected.double(), atol=1e-6, rtol=0)


def test_the_kernel_distance_of_two_laws_is_that_of_their_moments():
    """In one dimension E(xy + 1)^3 = 1 + 3 m m' + 3 s s' + t t', of the means and the second and third moments."""
    a, b = (torch.tensor(law)[:, None].repeat(1000, 1) for law in ([-1.0, 1.0], [0.0, 2.0]))
    first, second, third = (0, 1), (1, 2), (0, 4)  # moments of a and b
    expected = 3 * (first[0] - first[1]) ** 2 + 3 * (second[0] - second[1]) ** 2 + (third[0] - third[1]) ** 2
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=0.01)
    assert metrics.kernel_distance(b, a) == pytest.approx(metrics.kernel_distance(a, b))


def test_the_kernel_distance_has_no_bias():
    """Of sets of the same law its mean is 0, however small they are."""
    found = [metrics.kernel_distance(points(10, 3, seed=i), points(8, 3, seed=1000 + i)) for i in range(400)]
    interval = metrics.mean_interval(found)
    assert interval.low < 0 < interval.high


def test_recall_is_the_share_of_the_real_ones_that_lie_among_the_drawn():
    drawn = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    real = torch.tensor([[0.5], [-0.9], [-1.1], [100.0]])
    assert metrics.recall(real, drawn, k=1) == 0.5
    assert metrics.recall(real, drawn, k=2) == 0.75  # the outer ones now reach 2 far
    assert metrics.recall(real, real[:2].repeat(2, 1), k=1) == 0.5  # drawn twice is no further


@pytest.mark.parametrize("function", [metrics.kernel_distance, metrics.recall])
@pytest.mark.parametrize("shapes", [((5, 2), (5, 3)), ((5, 2), (1, 2)), ((10,), (10,))])
def test_points_that_cannot_be_compared_are_refused(function, shapes):
    with pytest.raises(ValueError, match="shapes"):
        function(*map(torch.zeros, shapes))
