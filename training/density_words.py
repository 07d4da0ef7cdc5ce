"""A law of the noise level in words for people who draw, from what it says of itself: first how noisy, then exactly."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .densities import Density, Mixture, Normal, Shifted, Truncated, UniformTime, quantiles, sentence
from .noise import time_of_log_snr

# Median share of noise, and what a person would call pictures with at least so much of it.
_AMOUNTS = (
    (0.85, "mostly very noisy"),
    (0.65, "mostly noisy"),
    (0.35, "half noise, half picture"),
    (0.0, "mostly clean"),
)


def in_words(law: Mapping[str, Any], name: str = "") -> str:
    """ "style-friendly, mostly very noisy (half of the steps at 91 to 98 % noise); exactly: normal mu=-6 sigma=2".

    ``law`` is what :meth:`~.densities.Density.describe` gave, in this version or another; ``name`` a preset's.
    """
    density = read_law(law)
    if density is None:
        return ", ".join(filter(None, (name, _exactly(law))))
    middle = quantiles(density, (0.25, 0.5, 0.75))
    most, half, least = time_of_log_snr(torch.tensor(middle)).tolist()  # of flow: the share of noise in what is seen
    amount = next(words for limit, words in _AMOUNTS if half >= limit)
    words = ", ".join(filter(None, (name, amount)))
    return f"{words} (half of the steps at {_range(least, most)} noise); exactly: {_exactly(law)}"


def read_law(law: Mapping[str, Any]) -> Density | None:
    """The law that describes itself so; None for a table, of which only the ends are told, and for unknown ones."""
    try:
        return _READERS[law["law"]](law)
    except (KeyError, TypeError, ValueError):
        return None


def _exactly(law: Mapping[str, Any]) -> str:
    try:
        return sentence(dict(law)) if law else ""
    except (KeyError, TypeError, ValueError, AttributeError):  # another version's, or damaged
        return str(dict(law))


def _range(low: float, high: float) -> str:
    """ "91 to 98 %", with further digits where the two would look the same."""
    for digits in (0, 1, 2):
        first, last = (f"{100 * share:.{digits}f}" for share in (low, high))
        if first != last:
            return f"{first} to {last} %"
    return f"{100 * low:.0f} %"


def _part(law: Mapping[str, Any]) -> Density:
    """ValueError for one that cannot be read."""
    density = read_law(law)
    if density is None:
        raise ValueError(f"the law {law} cannot be told from its description")
    return density


def _parts(laws: Sequence[Mapping[str, Any]]) -> tuple[Density, ...]:
    return tuple(map(_part, laws))


_READERS = {
    "normal": lambda law: Normal(law["mu"], law["sigma"]),
    "uniform-time": lambda law: UniformTime(law["shift"]),
    "mixture": lambda law: Mixture(_parts(law["parts"]), tuple(law["weights"])),
    "shifted": lambda law: Shifted(_part(law["of"]), law["delta"]),
    "truncated": lambda law: Truncated(_part(law["of"]), law["low"], law["high"]),
}
