"""The networks of score distillation: one frozen network in three roles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..adapters.attach import Adapter, switched_to
from ..attention_guidance import AttentionGuidance
from ..denoiser import Conditioning, Denoiser

# The denoiser with negative prompts, a row for each of the batch, inside its attention.
Against = Callable[[AttentionGuidance, Conditioning], Denoiser]


@dataclass(frozen=True)
class Networks:
    """Without an adapter the network is the teacher."""

    denoiser: Denoiser
    student: Adapter
    fake: Adapter
    precision: str = "float32"
    against: Against | None = None  # None = as diffusers' models are reached
    device: str = "cpu"  # type of the one that computes

    @contextmanager
    def acting_as(self, adapter: Adapter | None) -> Iterator[Denoiser]:
        """Inside, the network is the student, the fake, or with None the teacher."""
        bfloat16 = torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")
        with switched_to(adapter, (self.student, self.fake)), bfloat16:
            yield self.denoiser
