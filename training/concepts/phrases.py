"""Phrases of a prompt: what the picture shows, how it is drawn, and which of the encoder's tokens are whose.

FineStyle (NeurIPS 2024, pp. 52937-52961) splits a reference's prompt into content phrases and style phrases, and makes
a prompt of each pair by the template ``{concept phrase} in {style phrase} style``.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

from ..data.captions import one_line, styled

Ids = Callable[[str], Sequence[int]]  # the tokens of a text, with whatever the tokenizer puts around them


@dataclass(frozen=True)
class Phrases:
    """A prompt, and the phrases in it. ValueError where one is missing, or is no part of the prompt."""

    prompt: str
    content: tuple[str, ...]
    style: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.content:
            raise ValueError(
                "there are no content phrases: write what the prompt names, one line each, such as 'a cat'"
            )
        if not self.style:
            raise ValueError("there is no style phrase: write the words that name the style, such as 'flat cartoon'")
        known = [*self.content, *self.style]
        if both := sorted(set(self.content) & set(self.style)):
            raise ValueError(
                f"{', '.join(map(repr, both))} is a content phrase and a style phrase: take it out of one of the two"
            )
        if twice := repeated(known):
            raise ValueError(f"phrases that are there twice: {', '.join(map(repr, twice))}")
        if strangers := [phrase for phrase in known if place_in(self.prompt, phrase) is None]:
            raise ValueError(
                f"phrases that are no part of the prompt: {', '.join(map(repr, strangers))}. Copy them from it word by "
                f"word: {self.prompt!r}"
            )


def read_phrases(prompt: str, content: str, style: str) -> Phrases:
    """Of texts with a phrase in each line."""
    return Phrases(one_line(prompt), lines_of(content), lines_of(style))


def lines_of(text: str) -> tuple[str, ...]:
    return tuple(one_line(line) for line in text.splitlines() if line.strip())


def repeated(phrases: Sequence[str]) -> list[str]:
    """Those that are there more than once, each once."""
    return sorted({phrase for phrase in phrases if phrases.count(phrase) > 1})


def place_in(prompt: str, phrase: str) -> tuple[int, int] | None:
    """Where the phrase begins and ends in the prompt, as whole words in any case; None where it does not occur."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    match = re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE)
    return match.span() if match else None


def sub_prompts(phrases: Phrases) -> list[tuple[str, str, str]]:
    """Every content phrase with every style phrase: (content, style, prompt)."""
    return [(concept, style, styled(concept, style)) for concept in phrases.content for style in phrases.style]


def tokens_of(ids: Ids, prompt: str, phrase: str) -> range:
    """The places of a phrase's tokens among those of the prompt, whatever the tokenizer puts before and behind.

    A text's tokens begin as those of the same text cut off before a word: as far as both agree, they are of the words
    before it. ValueError for a phrase that is not in the prompt, or of which the tokenizer makes no token.
    """
    place = place_in(prompt, phrase)
    if place is None:
        raise ValueError(f"the phrase {phrase!r} is no part of the prompt {prompt!r}")
    start, end = (prompt[:at].rstrip() for at in place)
    whole = ids(prompt)
    first, last = _agreeing(ids(start), whole), _agreeing(ids(end), whole)
    if not prompt[place[1] :].strip() or last == len(whole):  # nothing behind it tells where its tokens end
        last = _length(ids, end, phrase)
    if last <= first:
        raise ValueError(f"the text encoder has no token for the phrase {phrase!r}: name what it knows")
    return range(first, last)


def places_of(texts: Callable[[str], Sequence[Sequence[int]]], prompt: str, phrase: str) -> list[int]:
    """The same where a model attends to several encoders' texts, one behind the other: wherever the phrase has tokens.

    ``texts``: the tokens of a prompt by each encoder. ValueError where none of them has any.
    """
    found, offset = [], 0
    for number, whole in enumerate(texts(prompt)):
        with suppress(ValueError):  # a prompt that is longer than this encoder takes, for example
            found += [offset + place for place in tokens_of(lambda text, n=number: texts(text)[n], prompt, phrase)]
        offset += len(whole)
    if not found:
        raise ValueError(
            f"the text encoder has no token for the phrase {phrase!r} in this prompt: name what it knows, before the "
            "end of what it takes"
        )
    return found


def _length(ids: Ids, text: str, more: str) -> int:
    """How many tokens a text has, with what is before them: they agree with those of the same text and more words."""
    found = ids(text)
    try:
        return _agreeing(found, ids(f"{text} {more}"))
    except ValueError:  # longer than the encoder takes: without the padding at the end
        padding = ids("")[-1]
        return len(found) - sum(1 for _ in takewhile(lambda token: token == padding, reversed(found)))


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
