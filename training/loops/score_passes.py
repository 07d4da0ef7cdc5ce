"""The passes of one iteration of score distillation: the student's pictures, their gradient, the fake's lesson."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..attention_guidance import AttentionGuidance
from ..denoiser import Conditioning, Denoiser
from ..distillation import DMD, dmd_gradient, fake_weight, guided, student_loss, vsd_gradient
from ..hosts.negative import NegativeDenoiser
from ..losses import mse
from ..noise import add_noise
from ..one_step import answer_of
from ..predictions import target
from .networks import Against, Networks


@dataclass(frozen=True)
class Judged:
    """What an iteration drew to judge the student's pictures by, on the device."""

    log_snr: Tensor  # (b,)
    eps: Tensor  # (b, c, h, w)
    scales: Tensor  # (b,) of guidance
    conditioning: Conditioning  # (b, …)
    null: Conditioning  # (b, …)
    away: Conditioning  # (b, …) what the teacher is guided away from: null, or negative prompts
    nasa: float = 0.0  # scale of the same in the student's attention


def pictures(networks: Networks, noise: Tensor, log_snr: Tensor, judged: Judged) -> Tensor:
    """x0 (b, c, h, w) in float32 of the student from unit noise, called at log_snr (b,). In ``acting_as(student)``."""
    denoiser = networks.denoiser
    if judged.nasa:
        against: Against = networks.against or partial(NegativeDenoiser, denoiser)
        denoiser = against(AttentionGuidance("nasa", judged.nasa), judged.away)
    return answer_of(denoiser, judged.conditioning)(noise, log_snr)


@torch.no_grad()
def gradient(networks: Networks, x0: Tensor, judged: Judged, convention: str) -> tuple[Tensor, Tensor]:
    """g (b, c, h, w) of the student's pictures, and the mean distance between what teacher and fake see, ()."""
    judge = networks.judge
    x_t = add_noise(judge.process, x0, judged.eps, judged.log_snr)
    with networks.acting_as(networks.teacher):
        real = _guided(judge, x_t, judged, judged.away)
    with networks.acting_as(networks.fake):
        if convention == DMD:
            fake = answer_of(judge, judged.conditioning)(x_t, judged.log_snr)
        else:
            fake = _guided(judge, x_t, judged, judged.null)  # never the negative prompts: NASA-T, table 5
    apart = (real - fake).abs().mean()
    if convention == DMD:
        return dmd_gradient(x0, real, fake), apart
    return vsd_gradient(real, fake, judge.prediction, judge.process, judged.log_snr), apart


def _guided(denoiser: Denoiser, x_t: Tensor, judged: Judged, away: Conditioning) -> Tensor:
    """x0 as the network sees it, guided: both texts in one batch."""
    both = {name: torch.cat([away[name], value]) for name, value in judged.conditioning.items()}
    null, conditional = answer_of(denoiser, both)(x_t.repeat(2, 1, 1, 1), judged.log_snr.repeat(2)).chunk(2)
    return guided(null, conditional, judged.scales)


def learn_student(x0: Tensor, g: Tensor, others: Tensor | None = None) -> Tensor:
    """Adds the gradient of the student's part of a step, and of ``others`` (b,) that depend on x0. Losses (b,)."""
    losses = student_loss(x0, g)
    (losses if others is None else losses + others).mean().backward()
    return losses


def learn_fake(networks: Networks, x0: Tensor, eps: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
    """Adds the gradient of the fake's part: noise in the student's pictures, which it must tell apart. Losses (b,)."""
    judge, x0 = networks.judge, x0.detach()
    x_t = add_noise(judge.process, x0, eps, log_snr)
    wanted = target(judge.prediction, judge.process, x0, eps, log_snr)
    with networks.acting_as(networks.fake):
        losses = mse(judge(x_t, log_snr, conditioning), wanted)
        losses = losses * fake_weight(judge.prediction, judge.process, log_snr)
        losses.mean().backward()
    return losses
