"""The words that the embedded model knows, and the prompts that are made of them.

A prompt is a set of words, ``{subject} in {style phrase} style``: every word belongs to one slot (subject,
palette, ground, fill, edge), so order does not matter. The free words ``<v0>`` to ``<v7>`` mean "some style"
and are what a new style is taught as.
"""

import re
from dataclasses import dataclass

from .renderer import (
    EDGES,
    FILLS,
    GROUNDS,
    PALETTES,
    SEEN_GROUNDS,
    SEEN_PALETTES,
    SUBJECTS,
    Style,
    held_out_combinations,
)

SLOTS = 8  # tokens; there is no mask, so every prompt is padded to the length that was trained
PAD = 0
FREE_WORDS = tuple(f"<v{i}>" for i in range(8))
STYLE_NAMES = (
    *("bauhaus", "riviera", "nocturne", "folklore", "arcade", "orchard", "pottery", "jazz", "alpine", "bazaar"),
    *("origami", "cabaret", "mosaic", "lagoon", "vintage", "safari", "opera", "comet", "quilt", "harbour"),
    *("tundra", "fresco", "signal", "picnic"),
)
FUNCTION_WORDS = frozenset({"a", "an", "the", "in", "style", "of", "with", "and"})  # known, and without meaning

WORDS = (
    "<pad>",
    *SUBJECTS,
    *tuple(PALETTES)[:SEEN_PALETTES],
    *GROUNDS[:SEEN_GROUNDS],
    *FILLS,
    *EDGES,
    *STYLE_NAMES,
    *FREE_WORDS,
)
INDEX = {word: i for i, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Tokens:
    """A prompt's word indices, padded to SLOTS, and the words that were not understood."""

    indices: list[int]
    unknown: list[str]


def tokenize(prompt: str) -> Tokens:
    """Splits a prompt into words.

    Raises ValueError when it has more meaningful words than SLOTS.
    """
    words = re.findall(r"<\w+>|\w+", prompt.lower())
    known = [INDEX[word] for word in words if word in INDEX and word != "<pad>"]
    unknown = [word for word in words if word not in INDEX and word not in FUNCTION_WORDS]
    if len(known) > SLOTS:
        raise ValueError(
            f"the prompt has {len(known)} words that carry meaning: the embedded model takes {SLOTS}, got {prompt!r}"
        )
    return Tokens(known + [PAD] * (SLOTS - len(known)), unknown)


def explain_unknown(unknown: list[str]) -> str:
    """Names the words the model does not know and lists those it does, what stands for a new style first."""
    style_words = WORDS[1 + len(SUBJECTS) : INDEX[STYLE_NAMES[0]]]
    return (
        f"the embedded model does not know {', '.join(map(repr, unknown))}. A new style is called by one of the free "
        f"words {', '.join(FREE_WORDS)}. It knows the subjects {', '.join(SUBJECTS)}; "
        f"the styles {', '.join(STYLE_NAMES)}; and the style words {', '.join(style_words)}"
    )


def named_styles() -> dict[str, Style]:
    """The styles that have a name, each a combination of seen attributes."""
    held_out, styles = set(held_out_combinations()), {}
    for i, name in enumerate(STYLE_NAMES):
        palette = i % SEEN_PALETTES
        ground = (i * 5 + i // 12) % SEEN_GROUNDS
        fill, edge = (i * 3 + i // 12) % len(FILLS), (i * 2 + i // 6) % len(EDGES)
        while (style := Style(palette, ground, fill, edge)) in held_out:
            ground = (ground + 1) % SEEN_GROUNDS
        styles[name] = style
    return styles
