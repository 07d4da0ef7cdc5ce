"""Sample pictures of a run, in its folder."""

import comfy.sd
from torch import Tensor

from ...training.loops.checkpoint import RunDirectory
from ...training.loops.config import RunConfig
from ...training.loops.samples import find_samples
from .memory import leave_device
from .previews import TrainingProgress
from .sampling import Painter


def draw_before(painter: Painter, run: RunDirectory, config: RunConfig, progress: TrainingProgress) -> None:
    """The pictures of step 0, by the model without an adapter, where the run's folder has none yet."""
    if 0 in find_samples(run.samples, config.sample_prompts, until=0):
        return
    pictures = painter(0)
    if pictures is not None:
        run.save_images(0, pictures, config.sample_prompts)
        progress.drawn(0)


def draw(painter: Painter, vae: comfy.sd.VAE, step: int) -> Tensor | None:
    """Pictures, after which the VAE leaves the device again."""
    try:
        return painter(step)
    finally:
        leave_device(vae.patcher)
