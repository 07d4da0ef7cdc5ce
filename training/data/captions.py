"""Captions: reading them, and the style phrase that training captions and prompts share.

The template ``{content} in {style phrase} style`` is that of Style-Friendly SNR's prompts (section 4 of the paper),
which are StyleDrop's.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..randomness import generator

FILE_KEYS = ("file", "image", "file_name")
CAPTION_KEYS = ("caption", "text", "prompt")
SHOWN = 5  # examples in an error message
FEW_TAGS = 8  # with more there are always enough orders
ATTEMPTS = 20  # draws for each order of tags that is wanted


@dataclass(frozen=True)
class Caption:
    """A caption as it was given, with where it comes from for messages."""

    name: str  # for example "cat.png"
    text: str
    style_phrase: str  # "" = none


@dataclass(frozen=True)
class Row:
    """One line of a JSONL file. Paths are relative to the file's folder in the file, resolved here."""

    image: Path
    caption: str
    mask: Path | None
    repeats: int
    place: str  # "captions.jsonl:3"
    style_phrase: str | None = None  # None = as the run has it


def one_line(text: str) -> str:
    """``text`` with every run of white space, line breaks too, as one space, and without a byte order mark."""
    return " ".join(text.removeprefix("\ufeff").split())


def styled(content: str, style_phrase: str) -> str:
    """``content`` in the template; unchanged where it contains the style phrase already.

    >>> styled("a cat.", "watercolor painting")
    'a cat in watercolor painting style'
    """
    content, style_phrase = one_line(content), one_line(style_phrase)
    if not style_phrase:
        raise ValueError("The style phrase is empty: give the words that name the style, such as 'watercolor painting'")
    if contains(content, style_phrase):
        return content
    return f"{content.rstrip(' .,;')} in {style_phrase} style"


def contains(caption: str, style_phrase: str) -> bool:
    """Whether the words of the phrase occur in the caption, in order, in any case, as whole words."""
    if not style_phrase.strip():
        return True
    words = r"\s+".join(map(re.escape, style_phrase.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE) is not None


def complete(captions: Sequence[Caption], mode: str = "content") -> list[str]:
    """The captions to train on. ``mode`` is a key of CAPTION_MODES.

    ValueError for an unknown mode, an empty caption, a missing style phrase: with the pictures named.
    """
    if mode not in CAPTION_MODES:
        raise ValueError(f"Unknown caption mode {mode!r}: expected one of {', '.join(CAPTION_MODES)}")
    if empty := [caption.name for caption in captions if not caption.text.strip()]:
        raise ValueError(f"Pictures without captions: {listed(empty)}. Describe what each shows, such as 'a cat'")
    return CAPTION_MODES[mode](captions)


def _from_content(captions: Sequence[Caption]) -> list[str]:
    if any(not caption.style_phrase.strip() for caption in captions):
        raise ValueError(
            "Captions of contents need a style phrase, such as 'watercolor painting': they become "
            "'{content} in {style phrase} style'. For captions that are complete choose the caption mode 'full'"
        )
    return [styled(caption.text, caption.style_phrase) for caption in captions]


def _as_given(captions: Sequence[Caption]) -> list[str]:
    missing = [caption for caption in captions if not contains(caption.text, caption.style_phrase)]
    if missing:
        phrases = " / ".join(sorted({caption.style_phrase for caption in missing}))
        examples = listed([f"{caption.name} ({one_line(caption.text)!r})" for caption in missing])
        raise ValueError(
            f"The style phrase {phrases!r} is missing from {len(missing)} of {len(captions)} captions: {examples}. "
            "Add it to them, or choose the caption mode 'content', which puts it there"
        )
    return [one_line(caption.text) for caption in captions]


def _plain(captions: Sequence[Caption]) -> list[str]:
    return [one_line(caption.text) for caption in captions]


def tag_orders(text: str, orders: int, keep: int, seed: int) -> list[str]:
    """``text`` as it is, and the tags between its commas in up to ``orders`` - 1 other orders; the first ``keep`` stay.

    A function of the text and the seed. Fewer where the tags do not allow as many.

    >>> tag_orders("a cat, red", 4, 0, seed=0)
    ['a cat, red', 'red, a cat']
    """
    tags = [tag for tag in map(str.strip, one_line(text).split(",")) if tag]
    front, rest = tags[:keep], tags[keep:]
    wanted = min(orders, math.factorial(min(len(rest), FEW_TAGS)))
    found = {", ".join(tags): text}
    for attempt in range(ATTEMPTS * orders):  # equal tags make fewer orders than the factorial
        if len(found) >= wanted:
            break
        places = torch.randperm(len(rest), generator=generator(seed, "order of tags", text, attempt)).tolist()
        order = ", ".join([*front, *(rest[place] for place in places)])
        found.setdefault(order, order)
    return list(found.values())


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. ValueError names a file that is something else."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it with that encoding") from error
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text (it contains zero bytes): save it with that encoding")
    return text


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file: objects with a file, a caption, and if wanted ``mask``, ``repeats``, ``style_phrase``.

    ValueError for every line that is none.
    """
    lines = enumerate(read_text(path).split("\n"), start=1)
    rows, problems = [], []
    for number, line in lines:
        try:
            rows += [_row(path, number, line)] if line.strip() else []
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    if not rows:
        raise ValueError(f'{path} is empty: expected lines such as {{"file": "cat.png", "caption": "a cat"}}')
    return rows


def _row(path: Path, number: int, line: str) -> Row:
    place = f"{path.name}:{number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{path}, line {number}: expected an object {{"file": …, "caption": …}}, got {line[:60]}')
    mask = row.get("mask")
    if mask is not None and not isinstance(mask, str):
        raise ValueError(f"{path}, line {number}: the mask {mask!r} is not a file name")
    repeats = row.get("repeats", 1)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"{path}, line {number}: repeats is {repeats!r}, expected a whole number from 1")
    phrase = row.get("style_phrase")
    if phrase is not None and not isinstance(phrase, str):
        raise ValueError(f"{path}, line {number}: the style phrase {phrase!r} is no text")
    return Row(
        image=path.parent / _entry(row, FILE_KEYS, f"{path}, line {number}"),
        caption=one_line(_entry(row, CAPTION_KEYS, f"{path}, line {number}")),
        mask=path.parent / mask if mask else None,
        repeats=repeats,
        place=place,
        style_phrase=one_line(phrase) if phrase is not None else None,
    )


def _entry(row: dict[str, object], keys: tuple[str, ...], where: str) -> str:
    """The one text among ``keys`` of a row."""
    found = [key for key in keys if key in row]
    expected = " or ".join(map(repr, keys))
    if len(found) != 1:
        raise ValueError(f"{where}: expected one of the keys {expected}, got {sorted(row)}")
    text = row[found[0]]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {found[0]!r} is {text!r}, expected text")
    return text


CAPTION_MODES: dict[str, Callable[[Sequence[Caption]], list[str]]] = {
    "content": _from_content,  # "a cat" -> "a cat in watercolor painting style"
    "full": _as_given,  # captions are complete, and checked for the phrase
    "plain": _plain,  # captions are complete, and nothing is asked of them: for pictures in no style
}
