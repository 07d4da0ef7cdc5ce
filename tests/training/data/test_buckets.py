import math

import pytest

from stylewright.training.data.buckets import Bucket, enlargement, kept, make_buckets, nearest

SIZES = [(128, 16), (512, 64), (1000, 16), (1024, 64), (1024, 8)]


@pytest.mark.parametrize(("resolution", "multiple"), SIZES)
def test_buckets_fill_the_budget_and_never_exceed_it(resolution, multiple):
    side = resolution // multiple
    for bucket in make_buckets(resolution, multiple):
        assert bucket.height % multiple == bucket.width % multiple == 0
        tokens = bucket.height * bucket.width // multiple**2
        assert tokens <= side**2
        # One more column of tokens would be too many.
        assert tokens + min(bucket.height, bucket.width) // multiple > side**2
        assert 1 / 4 <= bucket.aspect <= 4


@pytest.mark.parametrize(("resolution", "multiple"), SIZES)
def test_buckets_hold_the_square_and_each_shape_both_ways(resolution, multiple):
    buckets = make_buckets(resolution, multiple)
    side = resolution // multiple * multiple
    assert Bucket(side, side) in buckets
    assert {Bucket(b.width, b.height) for b in buckets} == set(buckets)
    assert len(buckets) == len(set(buckets))


def test_the_smallest_model_has_one_bucket():
    assert make_buckets(16, 16) == [Bucket(16, 16)]


def test_a_resolution_below_one_token_is_an_error():
    with pytest.raises(ValueError, match=r"resolution 8 .* at least 16"):
        make_buckets(8, 16)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(77, 77, Bucket(1024, 1024)), (3000, 2000, Bucket(1216, 832)), (2000, 3000, Bucket(832, 1216))],
)
def test_known_shapes(height, width, expected):
    assert nearest(make_buckets(1024, 64), height, width) == expected


def test_extreme_shapes_get_the_extreme_buckets():
    buckets = make_buckets(512, 64)
    assert nearest(buckets, 10, 10000) == Bucket(256, 1024)
    assert nearest(buckets, 10000, 10) == Bucket(1024, 256)


def test_no_bucket_is_nearer_than_the_nearest():
    buckets = make_buckets(128, 16)
    for height in range(30, 200, 17):
        for width in range(30, 200, 13):
            best = abs(math.log(nearest(buckets, height, width).aspect / (width / height)))
            assert best <= min(abs(math.log(b.aspect / (width / height))) for b in buckets) + 1e-8


def test_of_equal_shapes_the_largest_is_taken():
    assert nearest([Bucket(64, 128), Bucket(128, 256), Bucket(96, 192)], 50, 100) == Bucket(128, 256)


def test_enlargement_and_what_is_kept():
    bucket = Bucket(100, 200)
    assert enlargement(bucket, 200, 400) == 0.5
    assert enlargement(bucket, 50, 400) == 2
    assert kept(bucket, 200, 400) == 1
    assert kept(bucket, 200, 800) == kept(bucket, 400, 400) == 0.5
    assert str(bucket) == "200x100"
