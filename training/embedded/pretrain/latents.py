"""For stage 3: encoded pictures for the transformer, in shards that are made when first needed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...formats.state import write_atomically
from ...randomness import generator
from ..renderer import render
from .scenes import training_scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

logger = logging.getLogger(__name__)

SHARD = 2000  # pictures
# Steps at which a shard joins: training starts early, and its second cycle meets more pictures.
JOINS = (0, 400, 800, 1200, 1600, 2000, 5400, 5800)
ATTRIBUTES = ("subject", "palette", "ground", "fill", "edge")


@dataclass
class LatentPool:
    """A growing pool of encoded scenes.

    At each step only the shards that have joined are drawn from; what a batch holds depends on the step alone, not on
    what happens to be on disk.
    """

    work: Path
    autoencoder: "AutoencoderTiny"
    seed: int
    joins: Sequence[int] = JOINS
    _latents: list[Tensor] = field(default_factory=list, init=False, repr=False)  # by shard
    _attributes: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Latents (size, 16, 16, 16) in float32 and attribute indices (size, 5)."""
        available = sum(step >= join for join in self.joins)
        while len(self._latents) < available:
            shard = self._shard(len(self._latents))
            self._latents.append(shard["latents"])
            self._attributes.append(shard["attributes"])
        rows = torch.randint(available * SHARD, (size,), generator=generator(self.seed, "batch", step)).tolist()
        places = [divmod(row, SHARD) for row in rows]
        latents = torch.stack([self._latents[k][i] for k, i in places])
        return latents.float(), torch.stack([self._attributes[k][i] for k, i in places])

    def _shard(self, k: int) -> dict[str, Tensor]:
        path = self.work / f"latents_{k:03}.safetensors"
        if not path.exists():
            logger.info("drawing and encoding pictures %d to %d", k * SHARD, (k + 1) * SHARD)
            shard = self._draw(k)
            write_atomically(path, lambda temporary: save_file(shard, temporary))
        return load_file(path)

    @torch.no_grad()
    def _draw(self, k: int) -> dict[str, Tensor]:
        scenes = training_scenes(SHARD, self.seed, "latents", k, named=0.25)
        encoder = self.autoencoder.encoder.to(memory_format=torch.channels_last)
        latents = []
        for start in range(0, SHARD, 10):
            pictures = 2 * render(scenes[start : start + 10]) - 1
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(encoder(pictures.to(memory_format=torch.channels_last)).to(torch.bfloat16))
        attributes = torch.stack([getattr(scenes, name) for name in ATTRIBUTES], 1)
        return {"latents": torch.cat(latents).contiguous(), "attributes": attributes}
