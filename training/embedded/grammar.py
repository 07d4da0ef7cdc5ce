"""What the embedded model can be asked for, as lines with alternatives: the prompts that its student learns from."""

from .renderer import EDGES, FILLS, GROUNDS, PALETTES, SEEN_GROUNDS, SEEN_PALETTES, SUBJECTS
from .vocabulary import FREE_WORDS, STYLE_NAMES


def grammar() -> tuple[str, ...]:
    """Half of the prompts name a style's four attributes, a quarter the style itself, a quarter "some style"."""
    subject = _one_of(SUBJECTS)
    attributes = (tuple(PALETTES)[:SEEN_PALETTES], GROUNDS[:SEEN_GROUNDS], FILLS, EDGES)
    by_words = f"{subject} in {' '.join(map(_one_of, attributes))} style"
    by_name, some = (f"{subject} in {_one_of(words)} style" for words in (STYLE_NAMES, FREE_WORDS))
    return by_words, by_words, by_name, some


def _one_of(words: tuple[str, ...]) -> str:
    return "{" + "|".join(words) + "}"
