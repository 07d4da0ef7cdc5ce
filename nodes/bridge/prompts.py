"""Prompts as ComfyUI's text encoders answer them, kept whole.

An encoder's answer is a tensor with any number of tokens plus a dict whose entries differ between families. The
core moves rows of tensors about, so it is handed row numbers, and the answers stay here.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import comfy.sd
import torch

from ...training.data.cache import settle
from ...training.denoiser import Conditioning
from .encodings import Encodings
from .text_encoders import others_answer_once, resident

PROMPT = "prompt"  # (b,) int64: rows of a PromptTable
GUIDANCE = "guidance"  # (b,) the distilled guidance of FLUX.1-dev and its kin


class PromptTable:
    """The prompts that a run has asked for, each encoded once."""

    def __init__(
        self,
        clip: comfy.sd.CLIP | None,
        answers: Mapping[str, dict] = MappingProxyType({}),
        encodings: Encodings | None = None,  # where what the encoder says is kept; None = nowhere
    ) -> None:
        """``answers`` are there from the start: conditioning that a user encoded, under the captions it has."""
        self._clip, self._encodings = clip, encodings or Encodings()
        self._rows: dict[str, int] = {caption: row for row, caption in enumerate(answers)}
        self._prompts = list(answers)
        self._answers: OrderedDict[int, dict] = OrderedDict(enumerate(answers.values()))
        self._most: int | None = None  # answers that are kept; None = all
        self.lasting = True  # whether an answer is the same whenever it is asked for

    def encode(self, prompts: list[str]) -> Conditioning:
        """Rows (b,) for prompts, encoding the new ones."""
        for prompt in prompts:
            if prompt not in self._rows:
                self._keep(len(self._prompts), self._encoded(prompt))
                self._rows[prompt] = len(self._prompts)
                self._prompts.append(prompt)
        return {PROMPT: torch.tensor([self._rows[prompt] for prompt in prompts])}

    def answer(self, row: int) -> dict:
        """What the text encoder says, under the names that a model's ``extra_conds`` takes. Not to be changed."""
        if not self.lasting:
            return _ask(self._clip, self._prompts[row])
        if row not in self._answers:
            self._keep(row, self._encoded(self._prompts[row]))
        self._answers.move_to_end(row)
        return self._answers[row]

    def _encoded(self, prompt: str) -> dict:
        if self._clip is None:
            raise ValueError("there is no text encoder for it: link the CLIP that belongs to the model")
        return self._encodings.recall("prompt", prompt, partial(_encode, self._clip, prompt))

    def _keep(self, row: int, answer: dict) -> None:
        self._answers[row] = answer
        while self._most is not None and len(self._answers) > self._most:
            self._answers.popitem(last=False)

    @contextmanager
    def asked_as_needed(self, most: int) -> Iterator[None]:
        """Inside, the text encoder is loaded, and asked whenever an answer is not among the ``most`` that are kept."""
        before = self._clip, self._encodings, self._most
        self._clip, self._encodings, self._most = resident(before[0]), Encodings(), most
        try:
            yield
        finally:
            self._clip, self._encodings, self._most = before

    @contextmanager
    def asked_anew(self) -> Iterator[None]:
        """Inside, the text encoder is asked for every answer, with gradients: an adapter is on it, and it is loaded."""
        before = self._clip
        self._clip, self.lasting = resident(before), False
        try:
            with others_answer_once(before):
                yield
        finally:
            self._clip, self.lasting = before, True


def conditioning_of(clip: comfy.sd.CLIP, prompt: str) -> list:
    """The CONDITIONING that ComfyUI's CLIPTextEncode gives, of tensors that autograd accepts."""
    answer = _encode(clip, prompt)
    return [[answer.pop("cross_attn"), answer]]


def _ask(clip: comfy.sd.CLIP, prompt: str) -> dict:
    answers = clip.encode_from_tokens_scheduled(clip.tokenize(prompt), show_pbar=False)
    if len(answers) != 1:
        raise ValueError(
            f"the text encoder changes over the steps ({len(answers)} keyframes), which has no meaning in training: "
            "connect a CLIP without scheduled hooks"
        )
    ((cross_attention, rest),) = answers
    return {**rest, "cross_attn": cross_attention}


def _encode(clip: comfy.sd.CLIP, prompt: str) -> dict:
    with torch.inference_mode():
        answer = _ask(clip, prompt)
    if not answer["cross_attn"].isfinite().all():
        raise ValueError(f"the text encoding of {prompt!r} contains NaN or infinity: run the text encoder in float32")
    return {key: _settled(value) for key, value in answer.items()}


def _settled(value: Any) -> Any:
    """Tensors that autograd accepts, wherever they are in an answer."""
    if isinstance(value, torch.Tensor):
        return settle(value)
    return [_settled(each) for each in value] if isinstance(value, list) else value
