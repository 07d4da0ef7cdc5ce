"""What is done to save memory. None of it changes a number, so that a run may continue with something else."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from ..gradients import differentiable, repeated_blocks
from .config import TrainConfig

ALL = -1  # every block, however many there are


@dataclass(frozen=True)
class Saving:
    """Which blocks compute their activations twice, and whether what they keep waits in CPU memory."""

    recomputed: frozenset[int] = frozenset()  # places among ``repeated_blocks``; or just ALL
    offload: bool = False

    def applied(self, module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """``module`` made differentiable in this way."""
        every = ALL in self.recomputed
        return differentiable(
            module, checkpoint=every or self.recomputed, offload=device if self.offload and self.recomputed else None
        )

    def beside(self) -> "Saving":
        """For a text encoder beside the network: all or nothing, for its blocks are small."""
        return Saving(frozenset({ALL}) if self.recomputed else frozenset())

    def cheaper(self, module: nn.Module) -> "Saving | None":
        """The next setting that takes less memory; None where this is the last one."""
        blocks = len(repeated_blocks(module))
        if blocks and not (ALL in self.recomputed or len(self.recomputed) == blocks):
            return Saving(frozenset({ALL}), self.offload)
        return None if self.offload or not blocks else Saving(frozenset({ALL}), offload=True)

    def describe(self, blocks: int) -> str:
        count = blocks if ALL in self.recomputed else len(self.recomputed)
        text = f"{count} of {blocks} blocks recomputed" if count else "nothing recomputed"
        return text + (", their inputs in CPU memory" if self.offload and count else "")


def as_configured(config: TrainConfig) -> Saving:
    """Every block recomputed, or none."""
    return Saving(frozenset({ALL}) if config.gradient_checkpointing else frozenset())
