"""Which of a prompt's tokens a model attends to, in the order of its context: those of one encoder, or of several."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import comfy.sd

from .prompts import PROMPT, PromptTable

Ids = Mapping[str, list[int]]  # of a text, by encoder
PADDING = -1
LEAST_TEMPLATE = 3  # tokens that all texts begin with; CLIP and T5 have one at most
LEAST_OF_ANIMA = 512  # tokens that its text is padded to


@dataclass(frozen=True)
class Part:
    """Of a context: an encoder's tokens from one on."""

    encoder: str
    first: int
    size: int

    def of(self, ids: Ids) -> list[int]:
        return ids[self.encoder][self.first :][: self.size]


class Tokens:
    """The tokens of texts, part by part of the model's context. ValueError where it is not known whose they are."""

    def __init__(self, clip: comfy.sd.CLIP, prompts: PromptTable, prompt: str) -> None:
        self._clip = clip
        answer = prompts.answer(int(prompts.encode([prompt])[PROMPT][0]))
        self._parts = parts_of(answer, self._ids(prompt), self._ids(""))
        self._least = LEAST_OF_ANIMA if "t5xxl_ids" in answer else 0

    def __call__(self, text: str) -> list[list[int]]:
        ids = self._ids(text)
        found = [part.of(ids) for part in self._parts]
        return [each + [PADDING] * (self._least - len(each)) for each in found]

    def _ids(self, text: str) -> Ids:
        """Embeddings from files count as one more token."""
        return {
            name: [token if isinstance(token, int) else PADDING for chunk in chunks for token, *_ in chunk]
            for name, chunks in self._clip.tokenize(text).items()
        }


def parts_of(answer: Mapping[str, Any], ids: Ids, blank: Ids) -> list[Part]:
    """Of a text encoder's answer to a prompt, whose tokens are ``ids``; ``blank`` are those of no words at all."""
    known = next((parts for name, parts in SEVERAL.items() if answer.get(name) is not None), None)
    if known is not None:
        return known(answer, ids)
    context = answer["cross_attn"].shape[1]
    lengths = {name: len(found) for name, found in ids.items()}
    without = [part for name in ids if (part := _without_template(name, ids[name], blank.get(name, []), context))]
    if without:
        return without[:1]
    single = [Part(name, 0, context) for name, length in lengths.items() if length == context]
    if single:
        return single[:1]  # SDXL's two have the same tokens
    pairs = [
        [Part(one, 0, first), Part(other, 0, second)]
        for one, first in lengths.items()
        for other, second in lengths.items()
        if "t5" in other and "t5" not in one and first + second == context
    ]
    if pairs:
        return pairs[0]  # SD3: its CLIPs, which have the same tokens, and T5 behind them
    raise ValueError(
        f"which of the {context} tokens that this model attends to are of which words is not known: locate by "
        "prediction error instead, or give a mask of each phrase"
    )


def _without_template(name: str, ids: list[int], blank: list[int], context: int) -> Part | None:
    """Of an encoder that cuts off what every text begins with, and then of what every text ends with."""
    begin, end = _agreeing(ids, blank), _agreeing(ids[::-1], blank[::-1])
    cut = len(ids) - context
    if begin < LEAST_TEMPLATE or not 0 < cut <= begin + end:
        return None
    return Part(name, min(begin, cut), context)


def _agreeing(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _hidream(answer: Mapping[str, Any], ids: Ids) -> list[Part]:
    """T5's, those of Llama's last layer, and those of another in every block: of Llama without the first token."""
    llama = Part("llama", 1, answer["conditioning_llama3"].shape[2])
    return [Part("t5xxl", 0, answer["cross_attn"].shape[1]), llama, llama]


def _hunyuan_dit(answer: Mapping[str, Any], ids: Ids) -> list[Part]:
    sizes = answer["cross_attn"].shape[1], answer["conditioning_mt5xl"].shape[1]
    return [Part("hydit_clip", 0, sizes[0]), Part("mt5xl", 0, sizes[1])]


def _anima(answer: Mapping[str, Any], ids: Ids) -> list[Part]:
    """T5's, which it makes an encoding of from Qwen's."""
    return [Part("t5xxl", 0, len(answer["t5xxl_ids"]))]


def _hidream_o1(answer: Mapping[str, Any], ids: Ids) -> list[Part]:
    return [Part(next(iter(ids)), 0, answer["text_input_ids"].shape[-1])]


# What an answer has of families that attend to several texts, or to another than the first.
SEVERAL: dict[str, Callable[[Mapping[str, Any], Ids], list[Part]]] = {
    "conditioning_llama3": _hidream,
    "conditioning_mt5xl": _hunyuan_dit,
    "t5xxl_ids": _anima,
    "text_input_ids": _hidream_o1,
}
