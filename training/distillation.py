"""Distilling a diffusion model into a one-step generator by its score, as functions of tensors.

Variational score distillation (VSD) moves the generator's pictures x0 to where the teacher finds them likelier than
a second network does, the *fake*, which learns the scores of the generator's own pictures (SwiftBrush,
arXiv 2312.05239; DMD, arXiv 2311.18828). Both see the same x_t = alpha x0 + sigma eps, and answer with the data that
they take to be in it, x0_real and x0_fake. The target is

    x0 - g,    g = sigma |alpha b - sigma a| (x0_fake - x0_real)

which is sigma^2 times the difference of what a network predicts, prediction = a x0 + b eps (predictions.py):

    eps    alpha sigma (x0_fake - x0_real) = sigma^2 (eps_real - eps_fake), the weight of SwiftBrush's code
    flow         sigma (x0_fake - x0_real) = sigma^2 (flow_real - flow_fake)

alpha and sigma are those of data and noise of unit variance, and of the share that log_snr says, whatever the model
multiplies them by: of HiDream-O1's own t, with noise of a spread of 8, sigma is 8 t / (1 + 7 t).

Two conventions of guidance, which must not be mixed:

``pg-sb``  one scale for both networks (SwiftBrush; drawn anew each iteration in PG-SB, arXiv 2412.02687). Where the
           generator's distribution is the teacher's, g vanishes at every scale: the scale says how much the prompt
           counts on the way there. g is affine in it: random scales have the g of their mean, and noise.
``dmd``    the teacher alone is guided, and g is divided by mean |x0 - x0_real| instead of weighted. The generator goes
           to the distribution that guidance makes.
"""

import torch
from torch import Tensor

from .losses import mse
from .noise import alpha_sigma, expand, wide
from .predictions import coefficients

PG_SB, DMD = "pg-sb", "dmd"
CONVENTIONS = (PG_SB, DMD)


def guided(null: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
    """(1 - scale) null + scale conditional, (b, …) in float32, for scales (b,) that may well be below 1."""
    null, conditional = wide(null), wide(conditional)
    return torch.lerp(null, conditional, expand(scale.to(conditional), conditional))


def guidance_scales(low: float, high: float, u: Tensor) -> Tensor:
    """Scales (n,) from ``low`` to ``high``, uniform as ``u`` (n,) is in [0, 1]."""
    return low + (high - low) * wide(u)


def vsd_gradient(real: Tensor, fake: Tensor, prediction: str, process: str, log_snr: Tensor) -> Tensor:
    """g (b, …) from the data (b, …) that teacher and fake see at log_snr (b,). What is not finite counts nothing."""
    alpha, sigma = alpha_sigma(process, log_snr)
    a, b = coefficients(prediction, alpha, sigma)
    weight = sigma * (alpha * b - sigma * a).abs()
    return torch.nan_to_num(expand(weight, real) * (wide(fake) - wide(real)), posinf=0.0, neginf=0.0)


def dmd_gradient(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(x0_fake - x0_real) / mean |x0 - x0_real|, the mean over each sample (DMD, Eq. 8; DMD2's code)."""
    size = (wide(x0) - wide(real)).abs().flatten(1).mean(1)
    return torch.nan_to_num((wide(fake) - wide(real)) / expand(size, x0), posinf=0.0, neginf=0.0)


def student_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """(b,): half the mean square to the target x0 - g, whose gradient by x0 is g over the number of elements."""
    return mse(x0, (wide(x0) - gradient).detach()) / 2


def fake_weight(prediction: str, process: str, log_snr: Tensor) -> Tensor:
    """(b,) on the mean square of what the fake predicts: (alpha b - sigma a)^2.

    That is alpha^2 where noise is predicted, as in SwiftBrush's code, and 1 for v and flow.
    """
    alpha, sigma = alpha_sigma(process, log_snr)
    a, b = coefficients(prediction, alpha, sigma)
    return (alpha * b - sigma * a).square()


def clamped_similarity_loss(pictures: Tensor, texts: Tensor, tau: float) -> Tensor:
    """(b,): max(0, tau - cosine) of features (b, d). No more is asked than tau (SwiftBrush v2, arXiv 2408.14176)."""
    cosine = torch.nn.functional.cosine_similarity(wide(pictures), wide(texts))
    return (tau - cosine).clamp(min=0)


def annealed(weight: float, step: int, steps: int) -> float:
    """``weight`` at the first step, and on a line to 0 at the last."""
    return weight * (1 - step / steps)
