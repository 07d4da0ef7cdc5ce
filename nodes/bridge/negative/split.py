"""One attention of image and text together, with negative prompts in its sequence: taken apart, answered, joined again.

The negative prompts are texts beside the positive one. A text attends to itself and to the image, as if it were the
only one. The image attends to itself and to each text, and what it takes from the positive one is held against the
others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ....training.attention_guidance import Tokens
from .attend import averaged, of_parts
from .gate import Call

POSITIVE, IMAGE = "positive", "image"
Kind = str | int  # a number is that of a negative prompt
OVERRIDE = "optimized_attention_override"  # of transformer options
ARGUMENTS = ("heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # after q, k, v in ComfyUI


Parts = Sequence[tuple[Kind, int]]  # of a sequence, from its beginning: kinds and counts of tokens


@dataclass(frozen=True)
class Layout:
    """Parts of a joint sequence. Other nodes may put more of the positive text in front of them."""

    known: tuple[tuple[Kind, int], ...]

    @classmethod
    def of(cls, text: int, negatives: Sequence[int], image: int) -> "Layout":
        """The positive text, the negative ones, the image."""
        return cls(((POSITIVE, text), *enumerate(negatives), (IMAGE, image)))

    @property
    def shortest(self) -> int:
        return sum(size for _, size in self.known)

    def parts(self, length: int) -> Parts:
        """Of a sequence of so many tokens."""
        return [(POSITIVE, length - self.shortest), *self.known]


def apart(x: Tensor, parts: Parts, dim: int = -2) -> dict[Kind, Tensor]:
    """A sequence's tokens by kind, in order."""
    found: dict[Kind, list[Tensor]] = {}
    for (kind, size), piece in zip(parts, x.split([size for _, size in parts], dim), strict=True):
        if size:
            found.setdefault(kind, []).append(piece)
    return {kind: pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) for kind, pieces in found.items()}


def together(answers: Mapping[Kind, Tensor], parts: Parts) -> Tensor:
    """What :func:`apart` took apart."""
    pieces, begun = [], dict.fromkeys(answers, 0)
    for kind, size in parts:
        if size:
            pieces.append(answers[kind].narrow(-2, begun[kind], size))
            begun[kind] += size
    return torch.cat(pieces, -2)


def without_negatives(x: Tensor, parts: Parts, dim: int = -2) -> Tensor:
    pieces = zip(parts, x.split([size for _, size in parts], dim), strict=True)
    return torch.cat([piece for (kind, _), piece in pieces if not isinstance(kind, int)], dim)


def lengthened(mask: Tensor, parts: Parts) -> Tensor:
    """A mask (..., queries or 1, keys) with the negative tokens in it, hidden from nothing, if they are not yet."""
    length, usual = sum(size for _, size in parts), sum(size for kind, size in parts if not isinstance(kind, int))
    for dim in (-1, -2) if mask.ndim > 1 else (-1,):
        if mask.shape[dim] == length or (dim == -2 and mask.shape[dim] == 1):
            continue
        if mask.shape[dim] != usual:
            raise ValueError(
                f"an attention mask of {tuple(mask.shape)} for {usual} tokens: another node's mask does not fit this "
                "model's sequence, and negative prompts cannot be put beside it"
            )
        usual_parts = [(kind, 0 if isinstance(kind, int) else size) for kind, size in parts]
        pieces = list(mask.split([size for _, size in usual_parts], dim))
        for at, (kind, size) in enumerate(parts):
            if isinstance(kind, int):
                shape = list(mask.shape)
                shape[dim] = size
                pieces[at] = mask.new_full(shape, True) if mask.dtype == torch.bool else mask.new_zeros(shape)
        mask = torch.cat(pieces, dim)
    return mask


@dataclass(frozen=True)
class Joint:
    """Queries, keys, values and masks by kind."""

    q: Mapping[Kind, Tensor]
    k: Mapping[Kind, Tensor]
    v: Mapping[Kind, Tensor]
    masks: Mapping[Kind, Mapping[Kind, Tensor]] | None  # of queries, then of keys

    def tokens(self, kind: Kind, queries: Kind) -> Tokens:
        mask = self.masks[queries][kind] if self.masks is not None else None
        return Tokens(self.k[kind], self.v[kind], mask)


@dataclass(eq=False)
class SplitAttention:
    """``optimized_attention_override`` for one call of a model.

    guided: of each equal part of the batch, whether it is of a positive prompt. turns: what moves the negative prompts
    to the places they would have as the only text: rotations (1, 1, 1, c / 2, 2, 2), one each. doubles: how many double
    blocks come before the single ones.

    Within compiled code: what is read here is the same in every call, or traced anew for each.
    """

    call: Call
    layout: Layout
    guided: tuple[bool, ...]
    before: Callable[..., Tensor] | None  # the override of another node
    turns: Sequence[Tensor] = ()
    doubles: int = 0
    counts: bool = False  # how many joint attentions there are: not in compiled code, which would be traced anew
    used: bool = False  # in a joint attention
    count: int = 0  # of them
    number: int = 0  # of the next joint attention, where it is counted

    def __call__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        q, k, v, *more = args
        given = {**dict(zip(ARGUMENTS, more, strict=False)), **kwargs}
        attention = function if self.before is None else _Bound(self.before, function)
        tokens = -2 if given.get("skip_reshape") else 1
        if not self._is_joint(q.shape[tokens], k.shape[tokens]):
            return attention(*args, **kwargs)
        if tokens == 1:  # heads are channels (b, n, c); SD3 has them apart in some
            q, k, v = (each.flatten(2) for each in (q, k, v))
        heads, mask, options = given.pop("heads"), given.pop("mask", None), given.pop("transformer_options")
        parts = self.layout.parts(q.shape[-2])
        mask = None if mask is None else lengthened(mask, parts)
        acts = self.call.layers is None or self.call.acts_in(self._number(options))
        self.used = True
        if self.counts:
            self.count += 1

        def answer(rows: slice, options: Mapping[str, Any], is_guided: bool) -> Tensor:
            def attend(query: Tensor, to: Tokens) -> Tensor:
                return attention(query, to.k, to.v, heads, mask=to.mask, transformer_options=options, **given)

            own = mask[rows] if mask is not None and mask.ndim > 2 and mask.shape[0] == q.shape[0] else mask
            if not is_guided:
                return _without(attend, q[rows], k[rows], v[rows], own, parts)
            return self._with_negatives(attend, self._joint(q[rows], k[rows], v[rows], own, parts), parts, acts)

        if all(self.guided):
            return answer(slice(None), options, True)
        size, answers = q.shape[0] // len(self.guided), []
        for is_guided, group in groupby(range(len(self.guided)), self.guided.__getitem__):
            numbers = list(group)
            rows = slice(numbers[0] * size, (numbers[-1] + 1) * size)
            answers.append(answer(rows, of_parts(options, numbers), is_guided))
        return torch.cat(answers)

    def _is_joint(self, queries: int, keys: int) -> bool:
        """Not of the image alone, nor of other tokens that another node attends to."""
        if min(queries, keys) < self.layout.shortest:
            return False
        if queries == keys:
            return True
        raise ValueError(
            f"another node has changed how many keys an attention has ({keys} for {queries} queries): "
            "negative prompts inside attention cannot be told apart from them. Remove one of the two"
        )

    def _number(self, options: Mapping[str, Any]) -> int:
        """Of the layer. SD3 does not say, and every block of it has one joint attention."""
        if "block_index" not in options:
            self.number += 1
            return self.number - 1
        return options["block_index"] + (self.doubles if options.get("block_type") == "single" else 0)

    def _joint(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, parts: Parts) -> Joint:
        queries, keys, values = (apart(each, parts) for each in (q, k, v))
        for number, turn in enumerate(self.turns):
            queries[number], keys[number] = turned(queries[number], turn), turned(keys[number], turn)
        if mask is None:
            return Joint(queries, keys, values, None)
        of_queries = apart(mask, parts) if mask.shape[-2] > 1 else dict.fromkeys(queries, mask)
        return Joint(queries, keys, values, {kind: apart(each, parts, -1) for kind, each in of_queries.items()})

    def _with_negatives(self, attend: Callable, joint: Joint, parts: Parts, acts: bool) -> Tensor:
        answers = {
            kind: attend(query, joint.tokens(kind, kind) + joint.tokens(IMAGE, kind))
            for kind, query in joint.q.items()
            if kind != IMAGE
        }
        query, image, text = joint.q[IMAGE], joint.tokens(IMAGE, IMAGE), joint.tokens(POSITIVE, IMAGE)
        if acts:
            answers[IMAGE] = averaged(
                self.call,
                lambda guidance, number: guidance.joint(attend, query, image, text, joint.tokens(number, IMAGE)),
            )
        else:
            answers[IMAGE] = attend(query, text + image)
        return together(answers, parts)


def _without(attend: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, parts: Parts) -> Tensor:
    """Of rows that no negative prompt is for: as without them, and nothing for their tokens, which nobody reads."""
    if mask is not None:
        mask = without_negatives(mask, parts, -1)
        mask = without_negatives(mask, parts) if mask.shape[-2] > 1 else mask
    q, k, v = (without_negatives(each, parts) for each in (q, k, v))
    answers = apart(attend(q, Tokens(k, v, mask)), [each for each in parts if not isinstance(each[0], int)])
    shape = list(answers[IMAGE].shape)
    for negative in {kind for kind, _ in parts if isinstance(kind, int)}:
        shape[-2] = sum(size for kind, size in parts if kind == negative)
        answers[negative] = answers[IMAGE].new_zeros(shape)
    return together(answers, parts)


@dataclass(frozen=True)
class _Bound:
    """Another node's override around the attention that it is given."""

    override: Callable[..., Tensor]
    function: Callable[..., Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.override(self.function, *args, **kwargs)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """(b, heads, n, c), each pair of channels rotated once more."""
    pairs = x.to(turn.dtype).unflatten(-1, (-1, 1, 2))
    return (turn * pairs).sum(-1).flatten(-2).to(x.dtype)
