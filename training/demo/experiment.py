"""The demo: one reference picture, a style learned from it under two laws, and everything looked at on the way."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.methods import AdapterConfig
from ..data.encoding import encode
from ..data.images import fit, load_picture
from ..data.items import items_from_memory
from ..density_presets import DensityConfig
from ..embedded.oracle import load_oracle
from ..embedded.renderer import HELD_OUT_STYLES, SIZE, SUBJECTS, render, scene_of
from ..embedded.weights import Weights
from ..formats.state import write_atomically
from ..hosts.embedded import load_embedded
from ..hosts.generate import generate
from ..hosts.host import Host
from ..loops.checkpoint import require_writable
from ..loops.config import TrainConfig
from ..loops.events import Event
from ..loops.train import train
from ..noise import PUBLISHED_TOKENS
from ..randomness import generator
from .scoring import Judge, Score, oracle_judge, other_subjects, picture_judge

FREE_WORD = "<v0>"  # "some style" to the model: the word that comes to mean this one
# On the embedded model the paper's rank and rate are too small and too slow; the laws are the paper's, carried to
# 64 tokens by the resolution rule.
LAWS = {
    "style-friendly": DensityConfig("style-friendly", reference_tokens=PUBLISHED_TOKENS),
    "sd3": DensityConfig("sd3", reference_tokens=PUBLISHED_TOKENS),
}
RECIPE = TrainConfig(
    batch_size=4,
    accumulation=1,
    learning_rate=2e-3,
    style_phrase=FREE_WORD,
    adapter=AdapterConfig(rank=8),
    save_every=0,
    report_every=5,
)


@dataclass(frozen=True)
class DemoOptions:
    """What the demo is asked for."""

    style: str = "regatta"  # a key of HELD_OUT_STYLES, where no picture is given
    image: Path | None = None  # a picture of the user's own
    subject: str = "star"  # what the picture shows
    steps: int = 60
    looks: int = 3  # how often the learning is looked at, at most: evenly, and last after the last step
    seed: int = 0
    guidance_scale: float = 3.0
    sampling_steps: int = 16

    @property
    def look_every(self) -> int:
        """Steps between two looks."""
        return self.steps // max(n for n in range(1, self.looks + 1) if self.steps % n == 0)


@dataclass(frozen=True)
class Look:
    """The pictures (b, 3, h, w) after some steps, and their score."""

    step: int
    pictures: Tensor
    score: Score


@dataclass(frozen=True)
class LawResult:
    """What one law has led to."""

    looks: list[Look]
    history: list[Event]
    seconds: float  # of training, without the looking


@dataclass(frozen=True)
class Experiment:
    """Everything the page shows."""

    options: DemoOptions
    reference: Tensor  # (3, h, w)
    truth: Tensor | None  # the right pictures (b, 3, h, w), where the renderer knows them
    before: Look
    laws: dict[str, LawResult]


Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


def run_experiment(options: DemoOptions, out: Path, progress: Progress) -> Experiment:
    """Trains under both laws from the same seed.

    ValueError, before any work, for an unknown style or subject, for no steps, for an unreadable picture, and for a
    folder ``out`` that cannot be written to.
    """
    _check(options)
    reference, truth = _reference(options)
    require_writable(out)
    host, oracle = load_embedded(), load_oracle(Weights().oracle)
    subjects = other_subjects(SUBJECTS.index(options.subject))
    before = _draw(host, options, subjects)
    judge = (
        oracle_judge(oracle, HELD_OUT_STYLES[options.style])
        if options.image is None
        else picture_judge(oracle, reference, before)
    )
    laws = {}
    for name, law in LAWS.items():
        run_dir = _empty(out / "runs" / name)
        laws[name] = _learn(host, reference, options, law, judge, run_dir, partial(progress, name))
    return Experiment(options, reference, truth, Look(0, before, judge(before, subjects)), laws)


def _empty(run_dir: Path) -> Path:
    """The folder without an earlier demo's run, which would be continued instead of done again."""
    if (run_dir / "config.json").is_file():
        shutil.rmtree(run_dir)
    return run_dir


def _check(options: DemoOptions) -> None:
    if options.image is None and options.style not in HELD_OUT_STYLES:
        raise ValueError(f"there is no style {options.style!r}: expected one of {', '.join(HELD_OUT_STYLES)}")
    if options.subject not in SUBJECTS:
        raise ValueError(f"the model draws no {options.subject!r}: expected one of {', '.join(SUBJECTS)}")
    if options.steps < 1:
        raise ValueError(f"got {options.steps} steps: expected 1 or more")
    if options.looks < 1:
        raise ValueError(f"got {options.looks} looks at the learning: expected 1 or more")


def _reference(options: DemoOptions) -> tuple[Tensor, Tensor | None]:
    """The picture to learn from, and the right pictures of the other subjects where they can be drawn."""
    shown = SUBJECTS.index(options.subject)
    if options.image is not None:
        return fit(load_picture(options.image, None, str(options.image)).pixels, SIZE, SIZE), None
    style = HELD_OUT_STYLES[options.style]
    subjects = torch.tensor([shown, *other_subjects(shown)])
    pictures = render(scene_of(subjects, style, generator(options.seed, "reference", options.style)))
    return pictures[0], pictures[1:]


def _draw(host: Host, options: DemoOptions, subjects: list[int]) -> Tensor:
    prompts = [f"{SUBJECTS[i]} in {FREE_WORD} style" for i in subjects]
    return generate(
        host, prompts, seed=options.seed, steps=options.sampling_steps, guidance_scale=options.guidance_scale
    )


def _learn(
    host: Host,
    reference: Tensor,
    options: DemoOptions,
    law: DensityConfig,
    judge: Judge,
    run_dir: Path,
    progress: Callable[[int, int], None],
) -> LawResult:
    dataset = encode(
        items_from_memory([reference], options.subject), host, resolution=host.resolution, style_phrase=FREE_WORD
    )
    subjects, looks, looking = other_subjects(SUBJECTS.index(options.subject)), [], 0.0

    def look(step: int) -> Tensor:
        nonlocal looking
        began = time.monotonic()
        pictures = _draw(host, options, subjects)
        looks.append(Look(step, pictures, judge(pictures, subjects)))
        looking += time.monotonic() - began
        return pictures

    config = replace(RECIPE, steps=options.steps, seed=options.seed, density=law, sample_every=options.look_every)
    began = time.monotonic()
    result = train(
        host.denoiser,
        dataset,
        config,
        run_dir=run_dir,
        report=lambda event: progress(event.step, event.steps),
        sample=look,
    )
    return LawResult(looks, result.history, time.monotonic() - began - looking)


def write_results(experiment: Experiment, path: Path) -> dict:
    """``results.json``: per law the style score, the subject score and the seconds of training, and the way there."""
    laws = {}
    for name, law in experiment.laws.items():
        last = law.looks[-1].score
        laws[name] = {
            "style_score": last.style,
            "subject_score": last.subject,
            "seconds": law.seconds,
            "looks": [{"step": look.step, **asdict(look.score)} for look in law.looks],
        }
    results = {
        "style": experiment.options.style if experiment.options.image is None else str(experiment.options.image),
        "steps": experiment.options.steps,
        "seed": experiment.options.seed,
        "before": {"style_score": experiment.before.score.style, "subject_score": experiment.before.score.subject},
        "laws": laws,
    }
    text = json.dumps(results, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return results
