"""How much noise a random scale of guidance brings into the gradient of a one-step student.

With r and f the data that frozen and learning teacher see, without (u) and with the prompt (c), and one scale k for
both, the gradient is a weight times

    (f_u - r_u) + k ((f_c - f_u) - (r_c - r_u))

which is affine in k: its mean over random scales is the gradient at their mean, and what is random adds noise of the
deviation of k times the bracket. Where the student's pictures are the teacher's, the bracket is 0. A random scale in
the frozen teacher alone brings noise of r_c - r_u instead, which never goes, and in the learning one alone f_c - f_u.
This measures the sizes of the three beside that of the gradient at the mean scale, in runs of ``one_step_students.py``.

    python benchmarks/guidance_noise.py --out students
"""

import argparse
import dataclasses
import math
from pathlib import Path
from unittest import mock

import torch
from one_step_students import HIGH, LOW, MEAN, SHORT, distilled, judge_of
from student_curves import table
from sweep import shown
from torch import Tensor

from stylewright.training.loops import score_passes

DEVIATION = (HIGH - LOW) / math.sqrt(12)
NAMES = ("random", "random, frozen", "random, learning")


class Sizes:
    """Notes what both teachers say of each batch, by the function that guides them."""

    def __init__(self) -> None:
        self.guided, self.frozen = score_passes.guided, None
        self.found: list[list[float]] = []  # by iteration: of each of NAMES, noise in parts of the gradient

    def __call__(self, null: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        own = (null.float(), conditional.float())
        if self.frozen is None:
            self.frozen = own
        else:
            (r_u, r_c), (f_u, f_c), self.frozen = self.frozen, own, None
            both = (f_c - f_u) - (r_c - r_u)
            gradient = _size(f_u - r_u + MEAN * both)
            sizes = [DEVIATION * _size(each) / gradient for each in (both, r_c - r_u, f_c - f_u)]
            self.found.append([size.median().item() for size in sizes])
        return self.guided(null, conditional, scale)


def _size(x: Tensor) -> Tensor:
    """(b,): root mean square of each sample."""
    return x.flatten(1).square().mean(1).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    judge, halves = judge_of(options.out), []
    for seed in range(options.seeds):
        config = dataclasses.replace(
            SHORT, seed=seed, steps=options.steps, sample_every=0, guidance_low=LOW, guidance_high=HIGH
        )
        sizes = Sizes()
        with mock.patch.object(score_passes, "guided", sizes):
            distilled(judge.host, config, run_dir=None, start=judge.start)
        halves.append(torch.tensor(sizes.found[options.steps // 2 :]).median(0).values.tolist())
    lines = [[name, shown(list(values))] for name, values in zip(NAMES, zip(*halves, strict=True), strict=True)]
    print("\n".join(table(("scales", "noise / gradient"), lines)))


if __name__ == "__main__":
    main()
