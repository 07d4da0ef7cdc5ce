"""A negative prompt inside attention on a diffusers model: two texts, one picture, one pass.

The network runs on twice the batch, the second half with the negative text. Wherever the picture's queries meet text,
:class:`~..attention_guidance.AttentionGuidance` makes one answer of both, which both halves get: the picture is the
same in each, and the negative text goes through the blocks beside it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..attention_guidance import AttentionGuidance, Tokens
from ..denoiser import Conditioning, Denoiser
from ..gradients import also_recomputed

TEXT_FIRST, IMAGE_FIRST, CROSS = "text first", "image first", "cross"
# Where a family's attention has its text: beside the picture's tokens, or in layers of its own.
LAYOUTS = {"flux": TEXT_FIRST, "sd3": IMAGE_FIRST, "pixart": CROSS, "sd15": CROSS, "sdxl": CROSS}
TOLD = ("context", "mask")  # of a conditioning, what is of the text alone; the rest is the positive prompt's


class NegativeDenoiser:
    """A denoiser with a negative prompt in its attention.

    ``negative``: a row for each of the batch, texts as long as the positive ones. ValueError for a family whose
    attention is not known here.
    """

    def __init__(self, denoiser: Denoiser, guidance: AttentionGuidance, negative: Conditioning) -> None:
        if denoiser.family not in LAYOUTS:
            raise ValueError(
                f"No negative prompts inside the attention of {denoiser.family} models: expected one of "
                f"{', '.join(LAYOUTS)}."
            )
        self.denoiser, self.guidance, self.negative = denoiser, guidance, negative
        self.family, self.module = denoiser.family, denoiser.module
        self.process, self.prediction = denoiser.process, denoiser.prediction
        self.log_snr_range = denoiser.log_snr_range

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction (b, c, h, w) in float32. ValueError where the texts differ in length."""
        if not self.guidance.scale:
            return self.denoiser(x_t, log_snr, conditioning)
        lengths = [each["context"].shape[1] for each in (conditioning, self.negative)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"Got a prompt of {lengths[0]} tokens and a negative one of {lengths[1]}: expected as many."
            )
        both = {
            name: torch.cat([value, self.negative[name] if name in TOLD else value])
            for name, value in conditioning.items()
        }
        with also_recomputed(_TwoTexts(self.guidance, LAYOUTS[self.family], lengths[0])):
            doubled = self.denoiser(x_t.repeat(2, 1, 1, 1), log_snr.repeat(2), both)
        return doubled[: len(x_t)]


class _TwoTexts(TorchFunctionMode):
    """Inside, attention of a batch whose second half has another text is guided."""

    def __init__(self, guidance: AttentionGuidance, layout: str, length: int) -> None:
        super().__init__()
        self._guidance, self._layout, self._length = guidance, layout, length

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(*args, **(kwargs or {}))  # torch switches the mode off in here

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        def attend(q: Tensor, tokens: Tokens) -> Tensor:
            return F.scaled_dot_product_attention(q, tokens.k, tokens.v, tokens.mask, *rest, **more)

        of_text = key.shape[-2] == self._length and query.shape[-2] != self._length
        if self._layout == CROSS and not of_text:
            return attend(query, Tokens(key, value, attn_mask))
        masks = (None, None) if attn_mask is None else attn_mask.chunk(2)
        positive, negative = (
            Tokens(k, v, mask) for k, v, mask in zip(key.chunk(2), value.chunk(2), masks, strict=True)
        )
        asking, beside = query.chunk(2)
        if self._layout == CROSS:
            answer = self._guidance.cross(attend, asking, positive, negative)
            return torch.cat([answer, answer])
        text, image = self._places(key.shape[-2])
        words, shared = _part(positive, text), _part(positive, image)
        other = _part(negative, text)
        picture = self._guidance.joint(attend, asking[..., image, :], shared, words, other)
        texts = attend(asking[..., text, :], words + shared), attend(beside[..., text, :], other + shared)
        order = [0, 1] if self._layout == TEXT_FIRST else [1, 0]
        halves = ([own, picture] for own in texts)
        return torch.cat([torch.cat([half[place] for place in order], -2) for half in halves])

    def _places(self, tokens: int) -> tuple[slice, slice]:
        if self._layout == TEXT_FIRST:
            return slice(0, self._length), slice(self._length, tokens)
        return slice(tokens - self._length, tokens), slice(0, tokens - self._length)


def _part(tokens: Tokens, places: slice) -> Tokens:
    return Tokens(tokens.k[..., places, :], tokens.v[..., places, :])
