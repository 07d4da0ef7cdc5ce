"""What a run differs in from another, in words: options by their values, and in words what is known by hashes alone."""

from collections.abc import Mapping
from typing import Any

# Entries of a run's identity that are hashes, said so that a person knows what to look at.
OF_INPUTS = {
    "data.fingerprint": "the pictures, captions or masks are others",
    "prompts": "the prompts are others: their lines, the order of these, or the style phrase",
    "start": "the adapter or model to begin with is another",
    "teacher": "the teacher's adapter is another",
}
# The same where one of both has none.
GIVEN = {"start": "an adapter or model to begin with is given", "teacher": "an adapter of the teacher is given"}


def in_words(name: str, was: Any, now: Any) -> str:
    """ "seed was 0 and is 3", or of a hash what it stands for."""
    if name in GIVEN and None in (was, now):
        return f"{GIVEN[name]} now, and there was none" if was is None else f"{GIVEN[name]} no more, and there was one"
    before, after = ("not given" if value is None else repr(value) for value in (was, now))
    return OF_INPUTS.get(name, f"{name} was {before} and is {after}")


def listed(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Of (was, is) by dotted name: "seed was 0 and is 3; the prompts are others"."""
    return "; ".join(in_words(name, *pair) for name, pair in differing.items())
