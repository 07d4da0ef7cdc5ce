"""Features of the embedded model's pictures and prompts: what the oracle sees, and what the words say.

A picture's are the square roots of the oracle's probabilities, a prompt's 1 at what it names and 0 elsewhere. Their
cosine is sqrt(named / 5) times the mean root of the probabilities of what is named: 1 where a prompt names subject and
all four attributes and every one is seen.

Whoever learns by these is not judged by the oracle any more: its figures are then what was asked for.
"""

import torch
from torch import Tensor

from ..hosts.host import Features
from .oracle import HEADS, Oracle
from .renderer import ATTRIBUTES, SUBJECTS
from .vocabulary import WORDS, named_styles, tokenize

CLASSES = {"subject": SUBJECTS, **ATTRIBUTES}  # words, by the oracle's heads


def features_of(oracle: Oracle) -> Features:
    return Features("oracle", lambda pictures: picture_features(oracle, pictures), text_features)


def picture_features(oracle: Oracle, pictures: Tensor) -> Tensor:
    """(b, classes of all heads) of pictures (b, 3, h, w) in [0, 1], squares of multiples of 64 pixels."""
    seen = oracle(pictures)
    return torch.cat([(seen[head].log_softmax(1) / 2).exp() for head in HEADS], 1)


def text_features(prompts: list[str]) -> Tensor:
    """(b, classes of all heads) of prompts; a style's name stands for its four words."""
    named = {name: style.words for name, style in named_styles().items()}
    places = {word: place for place, word in enumerate(word for head in HEADS for word in CLASSES[head])}
    rows = torch.zeros(len(prompts), len(places))
    for row, prompt in zip(rows, prompts, strict=True):
        for word in (WORDS[index] for index in tokenize(prompt).indices):
            for each in named.get(word, (word,)):
                if each in places:
                    row[places[each]] = 1.0
    return rows
