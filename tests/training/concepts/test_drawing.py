"""The preview: what its labels say."""

import torch

from stylewright.training.concepts.boxes import Box
from stylewright.training.concepts.drawing import draw_found
from stylewright.training.concepts.reference import Found


def test_labels_tell_letters_of_any_alphabet_apart():
    picture, box = torch.ones(3, 48, 64), Box(0, 0, 20, 20)
    drawn = [draw_found(picture, [Found(phrase, box, box, torch.ones(48, 64), False)]) for phrase in ("é", "ø", "ø")]
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
