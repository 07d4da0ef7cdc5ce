"""Text encoders inside of the denoiser, so that an adapter can be on them as on the network.

The conditioning is then the prompt itself, and what the encoders make of it depends on the adapter: it is made anew
in every call, with gradients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Conditioning, Denoiser
from .host import Host

PROMPT = "prompt"  # (b, n) int32: code points, and zeros behind them
PADDED_TO = 512  # a multiple of it, so that prompts of unlike length share a batch


class TextDenoiser:
    """A denoiser that reads prompts itself. Conditioning: ``prompt`` (b, n), and what ``denoiser`` takes besides."""

    def __init__(self, denoiser: Denoiser, encode: Callable[[list[str]], Conditioning]) -> None:
        self.family, self.module = denoiser.family, denoiser.module
        self.process, self.prediction = denoiser.process, denoiser.prediction
        self.log_snr_range = denoiser.log_snr_range
        self._denoiser, self._encode = denoiser, encode

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        rest = {name: value for name, value in conditioning.items() if name != PROMPT}
        prompts = as_text(conditioning[PROMPT])
        different = list(dict.fromkeys(prompts))
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=x_t.device)
        # Each alone, so that a row does not depend on its neighbours.
        answers = [self._encode([prompt]) for prompt in different]
        encoded = {name: torch.cat([each[name] for each in answers]).to(x_t.device)[rows] for name in answers[0]}
        return self._denoiser(x_t, log_snr, {**rest, **encoded})


def with_text_encoders(host: Host) -> Host:
    """The host with its CLIPs inside of the denoiser, on the device from now on. ValueError where it has none."""
    if host.open_text_encoders is None:
        raise ValueError(
            f"{host.name} ({host.denoiser.family}) has no CLIP text encoder, and no other kind can be trained: "
            "expected text_encoder_learning_rate=0."
        )
    text = host.open_text_encoders()
    return replace(
        host,
        denoiser=TextDenoiser(host.denoiser, text.encode),
        encode_prompts=lambda prompts: {PROMPT: as_tensor(prompts)},
        text_encoders=text.modules,
    )


def as_tensor(prompts: Sequence[str]) -> Tensor:
    """Prompts as code points (b, n)."""
    width = PADDED_TO * max(1, *(math.ceil(len(prompt) / PADDED_TO) for prompt in prompts))
    rows = [torch.tensor([ord(sign) for sign in prompt], dtype=torch.int32) for prompt in prompts]
    return torch.stack([F.pad(row, (0, width - len(row))) for row in rows])


def as_text(points: Tensor) -> list[str]:
    """The inverse of :func:`as_tensor`."""
    return ["".join(map(chr, row)).rstrip("\0") for row in points.tolist()]
