"""The embedded text encoder: one vector per word for the text stream, one per prompt for the modulation."""

import torch
from torch import Tensor, nn

from .vocabulary import PAD, WORDS, explain_unknown, tokenize

WIDTH = 128  # of both outputs


class TextEncoder(nn.Module):
    """Maps word indices (b, n) to context vectors (b, n, 128) and a pooled vector (b, 128).

    The pooled vector is the sum of one vector per word, which start out orthogonal: the words of a prompt stay
    separable however many there are. The empty prompt is all padding, and its pooled vector is exactly zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.pooled = nn.Embedding(len(WORDS), WIDTH)
        nn.init.orthogonal_(self.pooled.weight, gain=WIDTH**0.5)

    def forward(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        meaningful = (indices != PAD).unsqueeze(-1)
        return self.words(indices), (self.pooled(indices) * meaningful).sum(1)


def encode_prompts(encoder: TextEncoder, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Context (b, 8, 128) and pooled vectors (b, 128) of prompts.

    Raises ValueError for words outside the vocabulary, naming them and listing what is known.
    """
    tokens = [tokenize(prompt) for prompt in prompts]
    if unknown := sorted({word for prompt in tokens for word in prompt.unknown}):
        raise ValueError(explain_unknown(unknown))
    return encoder(torch.tensor([prompt.indices for prompt in tokens], device=encoder.words.weight.device))
