"""Prompts without pictures: lines to draw from, with alternatives in braces.

``{circle|star} in {jazz|opera} style`` stands for four prompts. Each line is as likely as any other, and each of its
prompts as any other of that line.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..denoiser import Conditioning
from ..randomness import generator
from .cache import Cache, digest, digest_named, settled
from .captions import styled
from .lines import Lines
from .store import Store

SHOWN = 200  # letters of a line that an error repeats
Encode = Callable[[list[str]], Conditioning]  # one row a prompt


@dataclass(frozen=True)
class Line:
    """A prompt with alternatives: what may stand at each place of it."""

    places: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        """How many prompts it stands for."""
        return math.prod(len(choices) for choices in self.places)

    def prompt(self, number: int) -> str:
        """One of them, counted from 0."""
        words = []
        for choices in reversed(self.places):
            number, choice = divmod(number, len(choices))
            words.append(choices[choice])
        return "".join(reversed(words))


def read_line(text: str) -> Line:
    """A line with its braces. ValueError for braces that do not match, or that are within each other."""
    places = []
    for position, part in enumerate(re.split(r"\{([^{}]*)\}", text)):
        if position % 2 == 0 and set(part) & set("{}"):
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
            raise ValueError(
                f"The prompt {shown!r} has a brace without its other, or one inside of another: write alternatives as "
                "{a|b}, which do not nest."
            )
        places.append(tuple(part.split("|")) if position % 2 else (part,))
    return Line(tuple(places))


@dataclass(frozen=True)
class Prompts:
    """What a run draws its prompts from."""

    lines: tuple[str, ...]
    file: Lines | None = None  # further lines, of which only those that are drawn are read
    style_phrase: str = ""  # of the file's: they become "{line} in {style phrase} style"

    def __post_init__(self) -> None:
        if not self.count:
            raise ValueError("There are no prompts: give at least one line that is not empty.")
        for line in self.lines:
            if not line.strip():
                raise ValueError(f"Got the prompt {line!r}, which is empty: write what to draw, or leave it out.")
            read_line(line)

    @property
    def count(self) -> int:
        """Lines in all."""
        return len(self.lines) + (0 if self.file is None else len(self.file))

    def drawn(self, seed: int, step: int, count: int, use: str = "prompts") -> list[str]:
        """``count`` prompts, which are a function of seed, step and what they are drawn for."""
        draw = generator(seed, use, step)
        picks = torch.randint(self.count, (count,), generator=draw).tolist()
        lines = [read_line(self.line(pick)) for pick in picks]
        return [line.prompt(int(torch.randint(len(line), (), generator=draw))) for line in lines]

    def line(self, number: int) -> str:
        """One of them, counted from 0: the file's come last."""
        if self.file is None or number < len(self.lines):
            return self.lines[number]
        line = self.file[number - len(self.lines)]
        return styled(line, self.style_phrase) if self.style_phrase else line

    def fingerprint(self) -> str:
        further = () if self.file is None else (self.file.digest, self.style_phrase)
        return digest(*self.lines, *further)


def read_prompts(path: Path, folder: Path) -> Lines:
    """The lines of a text file of any size. ``folder`` is for its index. ValueError where it has none."""
    lines = Lines(path, folder, read_line)
    if not lines:
        raise ValueError(f"{path} has no prompts: write one a line, alternatives as {{a|b}}.")
    return lines


def remembered(encode: Encode, cache: Cache | Store, encoder: str) -> Encode:
    """``encode`` that keeps each prompt's row.

    ``encoder`` names what encodes. What it makes of the empty prompt tells it from others of that name.
    """
    encoder = digest(encoder, digest_named(settled(encode([""]))))

    def recall(prompts: Sequence[str]) -> Conditioning:
        rows = [
            cache.recall("prompt", digest(encoder, prompt), lambda prompt=prompt: encode([prompt]))
            for prompt in prompts
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    return recall
