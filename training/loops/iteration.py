"""One iteration of distillation: an update of the student, then those of the fake network."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..clocks import log_snr_at
from ..processes import Processes
from ..sharding import whole
from .distil_config import DistilConfig
from .learner import Learner
from .likeness import Likeness, unlikeness
from .meter import Meter
from .networks import Networks
from .pairs import Pairs
from .score_draws import Draws
from .score_passes import gradient, learn_fake, learn_student, pictures
from .share import Share


@dataclass(frozen=True)
class Iteration:
    """What the iterations of a run have in common."""

    config: DistilConfig
    networks: Networks
    draws: Draws
    pairs: Pairs
    learner: Learner  # of the student …
    taught: Learner  # … and of the fake
    meter: Meter
    share: Share
    processes: Processes
    device: torch.device
    check: Callable[[], None] | None  # called before every pass of the student
    likeness: Likeness | None = None

    def run(self, step: int, prompts: list[str]) -> None:
        """With the prompts of all the step's samples."""
        drawn = [self._student_pass(step, rows, prompts[rows]) for rows in self.share.of_step]
        self.meter.add_norm(step, self._summed(self.learner))
        if self.device.type == "cpu":
            with self.processes.together():
                self.meter.check(step)
        with self.learner.updating():
            _update(self.learner)
            for number in range(self.config.fake_updates):
                self._teach_fake(step, number, prompts, drawn)

    def _student_pass(self, step: int, rows: slice, prompts: list[str]) -> Tensor:
        """Adds the gradient of these samples. Their pictures x0 (b, c, h, w)."""
        with self.processes.together():
            if self.check is not None:
                self.check()
            judged = self.draws.judged(step, rows, prompts)
            by_pairs, place = self.pairs.teach(step), self.pairs.place(step)
            judged = replace(judged, nasa=0.0) if by_pairs else judged
        networks, call = self.networks, self._call(len(prompts))
        with self.processes.passing():
            with networks.acting_as(networks.student):
                x0 = pictures(networks, self.draws.noise(place, "student", rows), call, judged)
            if by_pairs:  # the loss to x0 - g is then the one to what the teacher drew
                g = x0.detach() - self.pairs.drawn(place, rows, judged.conditioning, judged.null)
            else:
                g, apart = gradient(networks, x0.detach(), judged, self.config.convention)
                self.meter.note("apart", apart)
            with networks.acting_as(networks.student):
                losses = learn_student(x0, g, self._unlike(step, x0, prompts, rows))
        self.meter.add(step, tuple(prompts), judged.log_snr.cpu(), losses)
        return x0.detach()

    def _unlike(self, step: int, x0: Tensor, prompts: list[str], rows: slice) -> Tensor | None:
        """Losses (b,) of pictures that are unlike their prompts, where that counts."""
        if self.likeness is None:
            return None
        found = unlikeness(self.likeness, self.config, step, x0, prompts, rows)
        if found is None:
            return None
        self.meter.note("likeness", found.cosine)
        return found.losses

    def _teach_fake(self, step: int, number: int, prompts: list[str], drawn: list[Tensor]) -> None:
        """An update of the fake by the student's pictures, which are given for each pass."""
        for rows, x0 in zip(self.share.of_step, drawn, strict=True):
            with self.processes.passing():
                lesson = self.draws.lesson(step, number, rows, prompts[rows])
                self.meter.note("fake_loss", learn_fake(self.networks, x0, *lesson).mean())
        self.meter.note("fake_norm", self._summed(self.taught))
        _update(self.taught)

    def _summed(self, learner: Learner) -> Tensor:
        """Adds up the gradients of all passes and processes, and clips them. Their norm ()."""
        pieces = self.config.samples_a_step // self.share.batch_size  # of a step's batch
        self.processes.sum_gradients(learner.parameters, pieces)
        return whole(clip_grad_norm_(learner.parameters, self.config.clip_norm or math.inf))

    def _call(self, rows: int) -> Tensor:
        """log_snr (rows,) at which the student is called."""
        return log_snr_at(self.draws.clock, torch.full((rows,), self.config.time)).to(self.device)


def _update(learner: Learner) -> None:
    learner.optimizer.step()
    learner.schedule.step()
    learner.optimizer.zero_grad()
    learner.average.update()
