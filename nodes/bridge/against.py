"""Negative prompts in a student's attention while it is distilled (NASA-T), by the negative node's own hooks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_patcher
import comfy.utils
from torch import Tensor

from ...training.attention_guidance import AttentionGuidance
from ...training.denoiser import Conditioning
from ...training.loops.networks import Against
from .denoiser import ComfyDenoiser
from .kernels import exchanged
from .negative import apply
from .prompts import PROMPT, PromptTable

Patcher = comfy.model_patcher.ModelPatcher
ANY_SCALE = AttentionGuidance("nasa", 1.0)


def check_hook(model: Patcher, prompts: PromptTable, negative: str) -> None:
    """ValueError where this model's attention to a negative prompt is out of reach."""
    row = int(prompts.encode([negative])[PROMPT][0])
    apply(model, _conditioning(prompts, row), ANY_SCALE)


@contextmanager
def negatives_inside(denoiser: ComfyDenoiser) -> Iterator[Against]:
    """How negative prompts come into the student, while its model is in a training session.

    What a call has put on the network's layers stays until the next one, because blocks are recomputed later: it
    answers for calls of its own alone.
    """
    with ExitStack() as stack:

        def against(guidance: AttentionGuidance, negative: Conditioning) -> "AgainstPrompts":
            stack.close()
            return AgainstPrompts(denoiser, guidance, negative, stack)

        yield against


class AgainstPrompts:
    """A denoiser that is kept away from a negative prompt, of each row its own."""

    def __init__(
        self,
        denoiser: ComfyDenoiser,
        guidance: AttentionGuidance,
        negative: Conditioning,
        placed: ExitStack,
    ) -> None:
        self.family, self.module = denoiser.family, denoiser.module
        self.process, self.prediction = denoiser.process, denoiser.prediction
        self.log_snr_range = denoiser.log_snr_range
        self._rows: dict[int, list[int]] = {}  # of the batch, by their negative prompt
        for row, prompt in enumerate(negative[PROMPT].tolist()):
            self._rows.setdefault(prompt, []).append(row)
        self._denoisers = {}
        for prompt in self._rows:
            patched = apply(denoiser.model, _conditioning(denoiser.prompts, prompt), guidance)
            _place(patched, denoiser.model, placed)
            self._denoisers[prompt] = ComfyDenoiser(patched, denoiser.prompts)

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction (b, c, …) in float32."""
        answer = x_t.new_zeros(x_t.shape).float()
        for prompt, rows in self._rows.items():
            told = {name: value[rows] for name, value in conditioning.items()}
            part = self._denoisers[prompt](x_t[rows], log_snr[rows], told)
            if len(self._rows) == 1:
                return part
            answer = answer.index_copy(0, x_t.new_tensor(rows).long(), part)
        return answer


def _conditioning(prompts: PromptTable, row: int) -> list[list[Any]]:
    answer = dict(prompts.answer(row))
    return [[answer.pop("cross_attn"), answer]]


def _place(patched: Patcher, model: Patcher, placed: ExitStack) -> None:
    """Puts on the loaded network what a clone has more of object patches, until ``placed`` is closed."""
    for path, patch in patched.object_patches.items():
        if model.object_patches.get(path) is not patch:
            owner, _, name = path.rpartition(".")
            placed.enter_context(exchanged(comfy.utils.get_attr(model.model, owner), name, patch))
