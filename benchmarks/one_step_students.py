"""One-step students of the embedded model: random guidance against fixed scales, and NASA-T on against off.

PG-SB (arXiv 2412.02687) guides both of distillation's teachers, the frozen one and the one that learns the student's
pictures, by one scale, drawn anew in each iteration. All arms have the same iterations, prompts and noise, and the
same student to begin with. Random scales are from U(1.5, 4.5), whose mean is the fixed 3 that stands beside them.

fixed 2, 3, 4.5    one scale for both teachers throughout
random             the same draw for both
random, frozen     the learning teacher keeps the scale of 3
random, learning   the frozen teacher keeps it
random, NASA-T     as random, with a negative prompt in the frozen teacher and in the student's attention
random, averaged   the very run of random, of which a moving average of the student is looked at

At every evaluation the student draws the same 60 prompts from the same noise.
KID, recall and precision are of the oracle's features, against pictures that the teacher draws of these prompts in 20
steps without guidance, which is where this convention leads.

    python benchmarks/one_step_students.py --out students            runs what is missing, then prints the tables
    python benchmarks/one_step_students.py --out students --report   prints the tables of what is there
    … --recipe calm                                                  longer, in larger batches and smaller steps
    … --references                                                   prints what the scores lie between
    … --figure students.png                                          and draws them

Every finished run is a line of ``runs.jsonl``, seed by seed.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from package import load_package

load_package()

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from student_curves import SCORES, report, table  # noqa: E402
from student_curves import draw as draw_figure  # noqa: E402
from sweep import read, run  # noqa: E402
from torch import Tensor  # noqa: E402

from stylewright.training.adapters.attach import attached  # noqa: E402
from stylewright.training.attention_guidance import AttentionGuidance  # noqa: E402
from stylewright.training.clocks import log_snr_at  # noqa: E402
from stylewright.training.data.prompts import Prompts  # noqa: E402
from stylewright.training.distillation import DMD  # noqa: E402
from stylewright.training.embedded.autoencoder import load_autoencoder  # noqa: E402
from stylewright.training.embedded.evaluate import Prompt, by_words, draw, figures  # noqa: E402
from stylewright.training.embedded.grammar import grammar  # noqa: E402
from stylewright.training.embedded.oracle import Oracle, load_oracle, score  # noqa: E402
from stylewright.training.embedded.renderer import EDGES, PALETTES, SEEN_PALETTES, SUBJECTS  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.formats.adapters import load_adapter  # noqa: E402
from stylewright.training.formats.starting import Start, start_of  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.hosts.negative import NegativeDenoiser  # noqa: E402
from stylewright.training.loops import score_passes  # noqa: E402
from stylewright.training.loops.distil import DistilResult, distil  # noqa: E402
from stylewright.training.loops.distil_config import DistilConfig  # noqa: E402
from stylewright.training.metrics import kernel_distance, mean_interval, recall  # noqa: E402

PICTURES = 60  # prompts of an evaluation
LOW, HIGH = 1.5, 4.5
TEACHERS = {  # scale, seed, pictures of each prompt
    "unguided": (1.0, 2, 2),
    "guided": (3.0, 2, 2),
    "unguided again": (1.0, 3, 1),
}
MEAN = (LOW + HIGH) / 2
UNWANTED = "inked"
NASA_SCALES, TESTED = (0.0, 0.2, 0.4, 0.8), 80  # of the negative prompt; pictures for each
SHORT = DistilConfig(
    steps=80,
    batch_size=4,
    learning_rate=5e-4,
    ema_decay=0.0,
    precision="bfloat16",
    sample_every=10,
)
RECIPES = {
    "short": SHORT,
    "calm": dataclasses.replace(SHORT, steps=300, batch_size=8, learning_rate=1e-4, sample_every=15),
}
# All arms begin with this student: from the model itself, most of so few iterations would go into leaving its blur.
BEGINNING = dataclasses.replace(
    SHORT, steps=60, batch_size=8, learning_rate=3e-4, ema_decay=0.9, convention=DMD, guidance_low=2.0, sample_every=0
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an arm's teachers are guided by, and away from."""

    low: float = LOW
    high: float = HIGH
    steady: str = ""  # which teacher keeps the mean scale: "frozen", "learning", or none
    negative: tuple[str, ...] = ()
    average: float = 0.0  # decay of the student's moving average


KINDS = {
    "random": Kind(),
    "fixed 3": Kind(3, 3),
    "fixed 2": Kind(2, 2),
    "fixed 4.5": Kind(4.5, 4.5),
    "random, frozen": Kind(steady="learning"),
    "random, learning": Kind(steady="frozen"),
    "random, NASA-T": Kind(negative=(f"{UNWANTED} style",)),
    "random, averaged": Kind(average=0.95),
}
NEGATIVE_TESTED = ("random", "random, NASA-T")


@dataclasses.dataclass(frozen=True)
class Arm:
    seed: int
    kind: str


def arms(seeds: int, kinds: Sequence[str]) -> Iterator[Arm]:
    for seed, kind in itertools.product(range(seeds), kinds):
        yield Arm(seed, kind)


@contextmanager
def steady(teacher: str) -> Iterator[None]:
    """Inside, one of the two teachers is guided by the mean scale, whatever is drawn for both."""
    turns, guided = itertools.cycle(("frozen", "learning")), score_passes.guided  # the order in which they are asked

    def held(null: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        return guided(null, conditional, torch.full_like(scale, MEAN) if next(turns) == teacher else scale)

    with mock.patch.object(score_passes, "guided", held):
        yield


@dataclasses.dataclass(frozen=True)
class Judge:
    """The prompts, the oracle, and the features of the teacher's pictures by guidance."""

    host: Host
    oracle: Oracle
    prompts: list[Prompt]
    teacher: dict[str, Tensor]
    start: Start

    def features(self, pictures: Tensor) -> Tensor:
        found: list[Tensor] = []
        handle = self.oracle.body.register_forward_hook(lambda module, given, answer: found.append(answer))
        with torch.no_grad():
            self.oracle(pictures)
        handle.remove()
        return found[0]

    def scores(self, pictures: Tensor) -> dict[str, float]:
        """Of pictures (n, 3, h, w), one of each prompt."""
        subjects = torch.tensor([prompt.subject for prompt in self.prompts])
        found = figures(score(self.oracle, pictures, subjects, [prompt.style for prompt in self.prompts]))
        drawn, teacher = self.features(pictures), self.teacher["unguided"]
        return {
            **{name: interval.mean for name, interval in found.items()},
            "KID": kernel_distance(drawn, teacher),
            "KID to guided": kernel_distance(drawn, self.teacher["guided"]),
            "recall": recall(teacher, drawn),
            "precision": recall(drawn, teacher),
        }


def fast_host() -> Host:
    """The embedded model in bfloat16, its autoencoder too, which on a CPU takes longer than the student's one step."""
    host = load_embedded(dtype=torch.bfloat16)
    decoder = load_autoencoder(Weights().autoencoder).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            pictures = decoder.decode(latents.float().contiguous(memory_format=torch.channels_last)).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1).contiguous()

    return dataclasses.replace(host, decode_latents=decode)


def beginning(host: Host, folder: Path) -> Start:
    student = distilled(host, BEGINNING, run_dir=folder)
    return start_of(load_adapter(student.path), SHORT.adapter, "a student of DMD's convention")


def distilled(host: Host, config: DistilConfig, **more: Any) -> DistilResult:
    size = (host.latent_channels, *[host.resolution // host.pixels_per_latent] * 2)
    return distil(host.denoiser, Prompts(grammar()), host.encode_prompts, config, latent_size=size, **more)


@functools.cache
def judge_of(out: Path) -> Judge:
    """Loaded once a process, and the teacher's pictures drawn once. One thread: the work is shared out by runs."""
    torch.set_num_threads(1)
    host = fast_host()
    judge = Judge(host, load_oracle(Weights().oracle), by_words(PICTURES, 1), {}, beginning(host, out / "start"))
    path = out / "teacher.safetensors"
    if not path.exists():
        texts = [prompt.text for prompt in judge.prompts]
        drawn = {
            name: draw(judge.host, texts * repeats, seed=seed, guidance_scale=scale)
            for name, (scale, seed, repeats) in TEACHERS.items()
        }
        save_file({name: pictures.half() for name, pictures in drawn.items()}, path)
    judge.teacher.update({name: judge.features(pictures.float()) for name, pictures in load_file(path).items()})
    return judge


def measure(out: Path, recipe: DistilConfig, arm: Arm) -> dict[str, list[dict[str, float]]]:
    """Scores over iterations; in the end, with the negative prompt by the scale of NASA."""
    judge, kind = judge_of(out), KINDS[arm.kind]
    host, curve, negative = judge.host, [], []
    texts = [prompt.text for prompt in judge.prompts]
    level = log_snr_at(host.denoiser.clock, torch.tensor([recipe.time]))
    config = dataclasses.replace(
        recipe,
        seed=arm.seed,
        guidance_low=kind.low,
        guidance_high=kind.high,
        negative_prompts=kind.negative,
        ema_decay=kind.average,
    )
    began = time.monotonic()

    def sample(step: int) -> None:
        curve.append({"step": step, **judge.scores(draw(host, texts, seed=1, one_step=level))})
        curve[-1]["seconds"] = round(time.monotonic() - began, 1)
        print(arm.kind, arm.seed, {name: round(value, 3) for name, value in curve[-1].items()}, file=sys.stderr)
        if step == config.steps and arm.kind in NEGATIVE_TESTED:
            negative.extend(with_negative(judge, level, scale) for scale in NASA_SCALES)

    with steady(kind.steady):
        distilled(host, config, run_dir=None, sample=sample, start=judge.start)
    return {"curve": curve, "negative": negative}


def references(out: Path) -> list[str]:
    """What the scores of a run lie between."""
    judge = judge_of(out)
    host, texts = judge.host, [prompt.text for prompt in judge.prompts]
    level = log_snr_at(host.denoiser.clock, torch.tensor([SHORT.time]))
    found = {"the teacher without guidance, another noise": load_file(out / "teacher.safetensors")["unguided again"]}
    found["the model in one step"] = draw(host, texts, seed=1, one_step=level)
    with attached(host.denoiser.module, SHORT.adapter, family=host.denoiser.family, seed=0) as adapter:
        adapter.load_state_dict(judge.start.joined(adapter.state_dict()))
        found["the student that all begin with"] = draw(host, texts, seed=1, one_step=level)
    scores = {name: judge.scores(pictures.float()) for name, pictures in found.items()}
    return table(("", *SCORES), [[name, *(f"{row[score]:.3f}" for score in SCORES)] for name, row in scores.items()])


def with_negative(judge: Judge, level: Tensor, scale: float) -> dict[str, float]:
    """Pictures whose prompts leave the outline open, and the unwanted one in the student's attention by ``scale``."""
    numbers = range(TESTED)
    subjects, palettes = [n % len(SUBJECTS) for n in numbers], [(7 * n) % SEEN_PALETTES for n in numbers]
    names = tuple(PALETTES)
    texts = [f"{SUBJECTS[s]} in {names[p]} style" for s, p in zip(subjects, palettes, strict=True)]
    away = judge.host.encode_prompts([f"{UNWANTED} style"] * TESTED)
    denoiser = NegativeDenoiser(judge.host.denoiser, AttentionGuidance("nasa", scale), away)
    host = dataclasses.replace(judge.host, denoiser=denoiser)
    with torch.no_grad():
        pictures = draw(host, texts, seed=4, one_step=level, batch=TESTED)
        seen = {name: logits.argmax(1) for name, logits in judge.oracle(pictures).items()}
    right = {
        "free": seen["edge"] != EDGES.index(UNWANTED),
        "subject": seen["subject"] == torch.tensor(subjects),
        "palette": seen["palette"] == torch.tensor(palettes),
    }
    return {"scale": scale, **{name: mean_interval(each.float()).mean for name, each in right.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--recipe", choices=RECIPES, default="short", help="each in a folder of its own")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which arms")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--references", action="store_true", help="only the teacher's scores, and those at the start")
    parser.add_argument("--figure", type=Path, help="draw it, too")
    options = parser.parse_args()
    if options.references:
        print("\n".join(references(options.out)))
        return
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        judge_of(options.out)  # once, not in each process
        work = functools.partial(measure, options.out, RECIPES[options.recipe])
        run(options.out, list(arms(options.seeds, options.kinds)), work, options.workers)
    rows = read(options.out)
    print(report(rows))
    if options.figure:
        draw_figure(rows, options.figure)


if __name__ == "__main__":
    main()
