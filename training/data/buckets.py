"""Aspect buckets: the sizes that pictures are trained at, all of about the same number of tokens.

Each picture keeps its shape as far as a size in whole tokens allows, instead of being cut square.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_ASPECT = 4.0  # longer pictures are cut


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels."""

    height: int
    width: int

    @property
    def aspect(self) -> float:
        return self.width / self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def make_buckets(resolution: int, multiple: int, max_aspect: float = MAX_ASPECT) -> list[Bucket]:
    """Sizes of at most resolution² pixels whose sides are multiples of ``multiple`` (pixels a token).

    For each height in tokens the widest that the budget allows, and the same turned by 90 degrees.
    """
    side = resolution // multiple  # tokens
    if side < 1:
        raise ValueError(f"The resolution {resolution} is less than one token of this model: at least {multiple}")
    shapes = {(rows, side * side // rows) for rows in range(1, side + 1)}
    shapes |= {(columns, rows) for rows, columns in shapes}
    return sorted(
        Bucket(rows * multiple, columns * multiple)
        for rows, columns in shapes
        if max(rows, columns) <= max_aspect * min(rows, columns)
    )


def nearest(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket whose shape is nearest in the logarithm of width/height; of equal ones the largest."""
    shape = math.log(width / height)

    def distance(bucket: Bucket) -> tuple[float, int]:
        # Rounded, so that equal shapes of different sizes compare as equal.
        return round(abs(math.log(bucket.aspect) - shape), 9), -bucket.height * bucket.width

    return min(buckets, key=distance)


def enlargement(bucket: Bucket, height: int, width: int) -> float:
    """By how much a picture grows to cover the bucket; below 1 it shrinks."""
    return max(bucket.height / height, bucket.width / width)


def kept(bucket: Bucket, height: int, width: int) -> float:
    """Share of the picture's area that is left after cutting it to the bucket's shape."""
    ratio = bucket.aspect / (width / height)
    return min(ratio, 1 / ratio)
