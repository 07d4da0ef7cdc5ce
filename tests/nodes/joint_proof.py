"""What negative prompts inside joint attention should do: two runs of the untouched model, one a text, in step.

Each run has its own text as its only one. At every joint attention both stop, the answer to the image is mixed by hand
in float64 from what both have there, and both go on with it.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from negative_proof import BLEND, SCALES, TAU, draw

KEY = "proof"


@dataclass
class Recorder:
    """Outermost around a model's calls."""

    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    answers: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, executor, *args, **kwargs):
        self.calls.append((args, kwargs))
        self.answers.append(executor(*args, **kwargs))
        return self.answers[-1]


def recorded(model, family, positive, **drawing) -> Recorder:
    """Calls and answers of a drawing. The wrapper that was put there first is the outermost."""
    from comfy.patcher_extension import WrappersMP

    clone, recorder = model.clone(), Recorder()
    others = clone.wrappers.pop(WrappersMP.APPLY_MODEL, {})
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, recorder)
    clone.wrappers[WrappersMP.APPLY_MODEL].update(others)
    draw(clone, family, positive, **drawing)
    return recorder


@dataclass
class Mixed:
    """Attention of two runs in step. ``image`` is how many tokens of a sequence's end are the image's, or of its
    beginning where it is ``first``.
    """

    method: str
    image: int
    scale: float
    text_only: bool = True
    first: bool = False
    acts: Callable[[int], bool] = lambda number: True
    given: dict[int, tuple] = field(default_factory=dict)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))

    def of(self, run: int) -> Callable:
        number = 0

        def attention(function, q, k, v, *rest, **kwargs):
            nonlocal number
            if q.shape[2 if kwargs.get("skip_reshape") else 1] <= self.image:
                return function(q, k, v, *rest, **kwargs)
            heads, mask, *_ = (*rest, *(kwargs.get(name) for name in ("heads", "mask")[len(rest) :]))
            self.given[run] = _parts(q, k, v, heads, mask, kwargs.get("skip_reshape", False), self.image * self.first)
            self.barrier.wait()
            own, both = self.given[run], (self.given[0], self.given[1])
            text = own.answer(slice(None, -self.image))
            image = self.mix(*both) if self.acts(number) else both[0].answer(slice(-self.image, None))
            number += 1
            self.barrier.wait()
            return torch.cat([text, image], 1).roll(self.image * self.first, 1).to(q.dtype)

        return attention

    def mix(self, positive: "Given", negative: "Given") -> torch.Tensor:
        """(b, n, c) of the image's queries."""
        image = slice(-self.image, None)
        z_positive = positive.answer(image)
        if self.method == "vsf":
            scores = torch.cat([positive.scores(image), negative.scores(image)[..., : -self.image]], -1)
            values = torch.cat([positive.v, -self.scale * negative.v[..., : -self.image, :]], -2)
            return _joined(scores.softmax(-1) @ values)
        weights, values = negative.scores(image).softmax(-1), negative.v
        if self.method == "nasa":
            if self.text_only:
                weights, values = weights[..., : -self.image], values[..., : -self.image, :]
            return z_positive - self.scale * _joined(weights @ values)
        moved = z_positive + self.scale * (z_positive - _joined(weights @ values))
        grown = moved.abs().sum(-1, keepdim=True) / z_positive.abs().sum(-1, keepdim=True)
        return BLEND * moved * grown.clamp_max(TAU) / grown + (1 - BLEND) * z_positive


@dataclass
class Given:
    """A run's queries, keys and values (b, heads, n, c), and what is added to its scores."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor

    def scores(self, queries: slice) -> torch.Tensor:
        mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., queries, :]
        return self.q[..., queries, :] @ self.k.transpose(-1, -2) / math.sqrt(self.q.shape[-1]) + mask

    def answer(self, queries: slice) -> torch.Tensor:
        return _joined(self.scores(queries).softmax(-1) @ self.v)


def _parts(q, k, v, heads, mask, has_heads: bool, moved: int) -> Given:
    q, k, v = (
        each.double() if has_heads else each.double().reshape(*each.shape[:2], heads, -1).transpose(1, 2)
        for each in (q, k, v)
    )
    q, k, v = (each.roll(-moved, 2) for each in (q, k, v))
    mask = torch.zeros(1, 1) if mask is None else mask.double()
    return Given(q, k, v, mask[:, None] if mask.ndim == 3 else mask)


def _joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def in_step(model, mixed: Mixed, calls) -> torch.Tensor:
    """The answer to two calls of a BaseModel, the positive prompt's and the negative's."""
    answers: dict[int, Any] = {}

    def run(number: int) -> None:
        args, kwargs = calls[number]
        *args, options = args
        options = {
            **{name: each for name, each in options.items() if name != "wrappers"},
            "optimized_attention_override": mixed.of(number),
        }
        try:
            with torch.inference_mode():
                answers[number] = model.apply_model(*args, options, **kwargs)
        except BaseException as error:
            mixed.barrier.abort()
            answers.setdefault("error", error)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if "error" in answers:
        raise answers["error"]
    return answers[0]


OF_TEXT = ("attention_mask", "num_tokens", "txt_byt5", "encoder_hidden_states_llama3")


def expected(
    model, family, recorder: Recorder, negative, image: int, method: str, patches_of_negative=None, **options
) -> list[torch.Tensor]:
    """Of each recorded call of positive prompts alone, the answer by hand."""
    text = recorded(model, family, negative).calls[0]
    found = []
    for args, kwargs in recorder.calls:
        x, t, concat, context, control, settings = positional(args, kwargs)
        own = {name: each for name, each in kwargs.items() if name not in ARGUMENTS}
        theirs = {name: each for name, each in own.items() if name not in OF_TEXT}
        theirs |= {
            name: each if name == "attention_mask" else _rows(each, x.shape[0])
            for name, each in text[1].items()
            if name in OF_TEXT
        }
        against = _rows(positional(*text)[3], x.shape[0])
        mixed = Mixed(method, image, SCALES[method], first=family == "hidream", **options)
        of_negative = settings if patches_of_negative is None else {**settings, "patches": patches_of_negative}
        calls = [
            ((x, t, concat, context, control, settings), own),
            ((x, t, concat, against, control, of_negative), theirs),
        ]
        found.append(in_step(model.model, mixed, calls))
    return found


def _rows(value, count: int):
    return value.expand(count, *value.shape[1:]) if torch.is_tensor(value) else value


ARGUMENTS = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")


def positional(args, kwargs) -> list:
    return [*args, *(kwargs.get(name) for name in ARGUMENTS[len(args) :])]
