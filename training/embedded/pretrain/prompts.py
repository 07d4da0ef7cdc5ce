"""Prompts for training pictures: by the style's name, by its words, or by a free word."""

import torch
from torch import Tensor

from ..renderer import EDGES, FILLS, GROUNDS, PALETTES, SEEN_GROUNDS, SEEN_PALETTES, SUBJECTS
from ..vocabulary import FREE_WORDS, INDEX, PAD, SLOTS, STYLE_NAMES, named_styles

NAME = 0.5  # share of pictures in a named style whose prompt gives the name instead of the words
FREE_WORD = 0.6  # share of nameless palettes whose prompt is a free word: "some style"
DROP_WORD = 0.1  # of each style word
DROP_SUBJECT, DROP_STYLE, DROP_PROMPT = 0.04, 0.06, 0.1


def prompts(attributes: Tensor, draw: torch.Generator) -> Tensor:
    """Word indices (b, 8) for pictures with attributes (b, 5): subject, palette (-1: nameless), ground, fill, edge."""
    n = len(attributes)
    subject, palette, ground, fill, edge = attributes.unbind(1)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=draw) < share

    tables = (tuple(PALETTES)[:SEEN_PALETTES], GROUNDS[:SEEN_GROUNDS], FILLS, EDGES)
    indices = (palette.clamp(min=0), ground, fill, edge)
    words = torch.stack([_words(table)[index] for table, index in zip(tables, indices, strict=True)], 1)
    words[palette < 0, 0] = PAD
    words = words.masked_fill(chance(DROP_WORD, 4), PAD)
    names = _style_names(palette, ground, fill, edge)
    by_name = (names != PAD) & chance(NAME)
    free = _words(FREE_WORDS)[torch.randint(len(FREE_WORDS), (n,), generator=draw)]
    by_free_word = (palette < 0) & chance(FREE_WORD)
    one_word = torch.where(by_name, names, torch.where(by_free_word, free, PAD))
    words = torch.where((by_name | by_free_word).unsqueeze(1), PAD, words)

    subject = _words(SUBJECTS)[subject].masked_fill(chance(DROP_SUBJECT), PAD)
    style = torch.cat([one_word.unsqueeze(1), words], 1).masked_fill(chance(DROP_STYLE, 1), PAD)
    prompt = torch.cat([subject.unsqueeze(1), style], 1)
    prompt = torch.nn.functional.pad(prompt, (0, SLOTS - prompt.shape[1]), value=PAD)
    return prompt.masked_fill(chance(DROP_PROMPT, 1), PAD)


def _words(words: tuple[str, ...]) -> Tensor:
    return torch.tensor([INDEX[word] for word in words])


def _style_names(palette: Tensor, ground: Tensor, fill: Tensor, edge: Tensor) -> Tensor:
    """The word of the style that has exactly these attributes, or PAD, (b,)."""
    style = torch.stack([palette, ground, fill, edge], 1)
    table = torch.tensor([list(vars(style).values()) for style in named_styles().values()])
    match = (style[:, None] == table).all(-1)
    return torch.where(match.any(1), _words(STYLE_NAMES)[match.float().argmax(1)], PAD)
