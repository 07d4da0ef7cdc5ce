"""One attention to a text, with negative prompts: its answer for the rows of positive prompts is guided."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ....training.attention_guidance import AttentionGuidance, Tokens
from .gate import Call

# Of a query (b, n, c) or (b, heads, n, d), tokens alike, and transformer options: an answer (b, n, c).
Attention = Callable[[Tensor, Tokens, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Attentions:
    """Of the layer: ``usual`` has other packs' functions in it, which the negative tokens are not shown to."""

    usual: Attention
    plain: Attention


def append(call: Call, layer: Any, text: Tensor) -> Tensor:
    """The negative prompts behind the text (b, n, c) that a layer makes keys and values of, unless it has done so."""
    if call.kept is not None and layer in call.kept:
        return text
    rows = [comfy.utils.repeat_to_batch_size(each.text.to(text), text.shape[0]) for each in call.negatives]
    return torch.cat([text, *rows], 1)


def taken(call: Call, layer: Any, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tokens, list[Tokens]]:
    """Keys and values (b, …, m, c) of a text to which :func:`append` was done, apart again.

    ``mask`` (…, m) is for the positive tokens; of negative ones none are masked.
    """
    call.answered[layer] = True
    if call.kept is not None and layer in call.kept:
        return Tokens(k, v, mask), call.kept[layer]
    sizes = [each.text.shape[1] for each in call.negatives]
    parts = [k.shape[-2] - sum(sizes), *sizes]
    positive, *negatives = (Tokens(*each) for each in zip(k.split(parts, -2), v.split(parts, -2), strict=True))
    if mask is not None:
        positive = Tokens(positive.k, positive.v, mask[..., : parts[0]])
    if call.kept is not None:
        one = all(each.text.shape[0] == 1 for each in call.negatives)  # the same for every row of a batch
        call.kept[layer] = [_own(each, 1 if one else k.shape[0]) for each in negatives]
    return positive, negatives


def _own(tokens: Tokens, rows: int) -> Tokens:
    """A copy: what it is a view of, the positive tokens with it, would be kept, too."""
    return Tokens(tokens.k[:rows].clone(), tokens.v[:rows].clone())


def answer(
    call: Call, attentions: Attentions, q: Tensor, positive: Tokens, negatives: Sequence[Tokens], options: Mapping
) -> Tensor:
    """What the layer takes from its text (b, n, c), before its output projection."""
    guided = call.guided(options)
    if not any(guided):
        return attentions.usual(q, positive, options)
    if all(guided):
        return _guided(call, attentions, q, positive, negatives, options)
    size, answers = q.shape[0] // len(guided), []
    for acts, parts in groupby(range(len(guided)), guided.__getitem__):
        numbers = list(parts)
        rows, some = slice(numbers[0] * size, (numbers[-1] + 1) * size), of_parts(options, numbers)
        text = _rows(positive, rows)
        if acts:
            against = [each if each.k.shape[0] == 1 else _rows(each, rows) for each in negatives]
            answers.append(_guided(call, attentions, q[rows], text, against, some))
        else:
            answers.append(attentions.usual(q[rows], text, some))
    return torch.cat(answers)


def _rows(tokens: Tokens, rows: slice) -> Tokens:
    mask = tokens.mask
    shared = mask is None or mask.shape[0] != tokens.k.shape[0]
    return Tokens(tokens.k[rows], tokens.v[rows], mask if shared else mask[rows])


def of_parts(options: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """Options as they would be if these parts of the batch were the whole of it."""
    kept = {}
    for name in ("cond_or_uncond", "uuids"):
        if options.get(name):
            kept[name] = [options[name][number] for number in numbers]
    return {**options, **kept}


def _guided(
    call: Call, attentions: Attentions, q: Tensor, positive: Tokens, negatives: Sequence[Tokens], options: Mapping
) -> Tensor:
    negatives = [_for_rows(each, q.shape[0]) for each in negatives]
    usual: list[Tensor] = []  # the positive answer, which every negative is held against

    def attend(query: Tensor, tokens: Tokens) -> Tensor:
        if tokens is positive:
            if not usual:
                usual.append(attentions.usual(query, tokens, options))
            return usual[0]
        attention = attentions.plain if any(tokens is each for each in negatives) else attentions.usual
        return attention(query, tokens, options)

    return averaged(call, lambda guidance, number: guidance.cross(attend, q, positive, negatives[number]))


def averaged(call: Call, one: Callable[[AttentionGuidance, int], Tensor]) -> Tensor:
    """The average of what ``one`` answers for each negative, by its number."""
    if len(call.negatives) == 1:
        return one(call.guidance, 0)
    total = torch.zeros(())
    for number, each in enumerate(call.negatives):
        part = each.weight * one(call.guidance, number)
        total = part if number == 0 else total + part
    return total


def _for_rows(tokens: Tokens, rows: int) -> Tokens:
    if tokens.k.shape[0] == rows:
        return tokens
    return Tokens(*(each.expand(rows, *each.shape[1:]) for each in (tokens.k, tokens.v)))
