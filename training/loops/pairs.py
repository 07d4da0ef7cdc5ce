"""What the teacher draws in many steps from the very noise that the student is given: a student's first lessons.

Distribution matching is blind where student and teacher have no picture in common. DMD2 (arXiv 2405.14867) found that
SDXL in one step needs a start by regression on such pairs. They are drawn when they are needed, from prompts alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..clocks import log_snr_at
from ..denoiser import Conditioning
from ..sampling import sample
from .distil_config import DistilConfig
from .networks import Networks
from .score_draws import Draws

Schedule = Callable[[int], Tensor]  # steps -> log_snr (steps + 1,), increasing


@dataclass(frozen=True)
class Pairs:
    """Of a run that begins with them. Those that come again are kept in main memory; a new session draws them anew."""

    config: DistilConfig
    networks: Networks
    draws: Draws
    schedule: Schedule | None = None  # of the teacher's sampling; None = evenly spaced times
    _kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by place and first row

    def teach(self, step: int) -> bool:
        """Whether the student learns from pairs in this step."""
        if step < self.config.pretraining_steps:
            return True
        self._kept.clear()
        return False

    def place(self, step: int) -> int:
        """The step whose noise and prompts the student is given in this one."""
        pairs = self.config.pretraining_pairs
        if not pairs or step >= self.config.pretraining_steps:
            return step
        return step % -(-pairs // self.config.samples_a_step)

    def drawn(self, place: int, rows: slice, conditioning: Conditioning, null: Conditioning) -> Tensor:
        """The teacher's data (b, c, h, w) in float32 for these samples of a place."""
        key = (place, rows.start)
        if key in self._kept:
            return self._kept[key].to(self.draws.texts.device)
        with self.networks.acting_as(self.networks.teacher) as teacher:
            data = sample(
                teacher,
                self.draws.noise(place, "student", rows),
                conditioning,
                log_snrs=self._levels(),
                null_conditioning=null,
                guidance_scale=self.config.pair_guidance,
            )
        if self.config.pretraining_pairs:
            self._kept[key] = data.cpu()
        return data

    def _levels(self) -> Tensor:
        steps = self.config.pretraining_teacher_steps
        if self.schedule is not None:
            return self.schedule(steps)
        levels = log_snr_at(self.draws.clock, torch.linspace(1, 0, steps + 1))
        return torch.cat([levels[:-1], levels.new_full((1,), torch.inf)])
