"""A fine-tune as an adapter, with no images: how soon a student does what its teacher does, on the embedded model.

The teacher is the embedded model with a LoRA that has learned a style from one picture. It draws some subjects, and a
student, LoRA or StyleInject, learns what it answers at these pictures' noised latents. At several numbers of steps the
student draws the subjects that neither saw with the style, and is held against the teacher on them:

style, subject   as the oracle sees them, as in ``mu_sweep.py``
distance         |student - teacher|^2 over |base - teacher|^2, of predictions at noised latents of the teacher's
                 pictures of those subjects: 1 is the base, 0 the teacher

    python benchmarks/imitation.py --out imitation            runs what is missing, then prints the table
    python benchmarks/imitation.py --out imitation --report   prints the table of what is there
"""

import argparse
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from package import load_package

load_package()

import torch  # noqa: E402
from sweep import read, run, shown  # noqa: E402

from stylewright.training.adapters.attach import attached  # noqa: E402
from stylewright.training.adapters.methods import AdapterConfig  # noqa: E402
from stylewright.training.data.dataset import Dataset  # noqa: E402
from stylewright.training.data.encoding import encode  # noqa: E402
from stylewright.training.data.items import items_from_memory  # noqa: E402
from stylewright.training.demo.scoring import oracle_judge, other_subjects  # noqa: E402
from stylewright.training.density_presets import DensityConfig  # noqa: E402
from stylewright.training.embedded.oracle import Oracle, load_oracle  # noqa: E402
from stylewright.training.embedded.renderer import HELD_OUT_STYLES, SUBJECTS, render, scene_of  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.generate import generate  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.loops.config import TrainConfig  # noqa: E402
from stylewright.training.loops.teaching import Answers, ask  # noqa: E402
from stylewright.training.loops.train import train  # noqa: E402
from stylewright.training.noise import add_noise, gaussian  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

FREE_WORD = "<v0>"
STEPS = (20, 40, 60)
TEACHER = TrainConfig(
    steps=60,
    batch_size=4,
    accumulation=1,
    learning_rate=2e-3,
    style_phrase=FREE_WORD,
    density=DensityConfig("style-friendly", reference_tokens=4096),
    adapter=AdapterConfig(rank=8),
    save_every=0,
)
STUDENTS = {  # the rates are those of style_methods.py
    "LoRA": (AdapterConfig(rank=8), 1e-3),
    "StyleInject": (AdapterConfig(method="styleinject", rank=2), 4e-3),
}
TAUGHT, DRAWING_STEPS, GUIDANCE = 5, 16, 3.0  # subjects that the teacher draws for its students
LOG_SNR = (4.0, 2.0, 0.0, -2.0, -4.0)  # where the distance is taken


@dataclasses.dataclass(frozen=True)
class Arm:
    """One teacher and its students."""

    style: str
    seed: int


@functools.cache
def model() -> tuple[Host, Oracle]:
    """What draws and what judges, loaded once a process. One thread: the work is shared out by runs."""
    torch.set_num_threads(1)
    return load_embedded(), load_oracle(Weights().oracle)


def prompts_of(subjects: list[int]) -> list[str]:
    return [f"{SUBJECTS[i]} in {FREE_WORD} style" for i in subjects]


def encoded(host: Host, pictures: torch.Tensor, prompts: list[str]) -> Dataset:
    items = items_from_memory(list(pictures), prompts)
    return encode(items, host, resolution=host.resolution, style_phrase="", caption_mode="plain")


@dataclasses.dataclass(frozen=True)
class Exam:
    """Noised latents of subjects that are not taught."""

    x_t: torch.Tensor
    log_snr: torch.Tensor
    conditioning: dict[str, torch.Tensor]

    @torch.no_grad()
    def answers(self, host: Host) -> torch.Tensor:
        return host.denoiser(self.x_t, self.log_snr, self.conditioning)


def exam_of(host: Host, pictures: torch.Tensor, prompts: list[str], seed: int) -> Exam:
    latents = host.encode_images(pictures).repeat(len(LOG_SNR), 1, 1, 1)
    log_snr = torch.tensor(LOG_SNR).repeat_interleave(len(prompts))
    eps = gaussian(tuple(latents.shape), generator(seed, "exam"))
    conditioning = host.encode_prompts(prompts * len(LOG_SNR))
    return Exam(add_noise(host.denoiser.process, latents, eps, log_snr), log_snr, conditioning)


def measure(arm: Arm) -> dict[str, dict[str, float]]:
    host, oracle = model()
    style, first = HELD_OUT_STYLES[arm.style], arm.seed % len(SUBJECTS)
    others = other_subjects(first)
    taught, asked = others[:TAUGHT], others[TAUGHT:]
    judge, prompts = oracle_judge(oracle, style), prompts_of(asked)

    def drawn(of: list[str]) -> torch.Tensor:
        return generate(host, of, seed=arm.seed, steps=DRAWING_STEPS, guidance_scale=GUIDANCE)

    def judged() -> dict[str, float]:
        return dataclasses.asdict(judge(drawn(prompts * 2), asked * 2))

    scene = scene_of(torch.tensor([first]), style, generator(arm.seed, "reference", arm.style))
    reference = encode(
        items_from_memory([render(scene)[0]], SUBJECTS[first]),
        host,
        resolution=host.resolution,
        style_phrase=FREE_WORD,
    )
    found = {"base": judged()}
    learned = train(host.denoiser, reference, dataclasses.replace(TEACHER, seed=arm.seed), run_dir=None)
    with tempfile.TemporaryDirectory() as folder:
        answers = Answers(Path(folder))
        with attached(host.denoiser.module, TEACHER.adapter, family=host.denoiser.family, seed=arm.seed) as adapter:
            adapter.load_state_dict(learned.adapter_state)
            found["teacher"] = judged()
            lessons = encoded(host, drawn(prompts_of(taught)), prompts_of(taught))
            exam = exam_of(host, drawn(prompts), prompts, arm.seed)
            truth = exam.answers(host)
            config = dataclasses.replace(TEACHER, steps=max(STEPS), seed=arm.seed, sample_every=STEPS[0])
            ask(host.denoiser, host.denoiser, lessons, config, answers)
        scale = (exam.answers(host) - truth).square().mean()
        for name, (student, rate) in STUDENTS.items():

            def look(step: int, name: str = name) -> torch.Tensor | None:
                if step in STEPS:
                    distance = (exam.answers(host) - truth).square().mean() / scale
                    found[f"{name} {step}"] = judged() | {"distance": float(distance)}
                return None

            own = dataclasses.replace(config, adapter=student, learning_rate=rate)
            train(host.denoiser, lessons, own, run_dir=None, sample=look, answers=answers)
    return found


def arms(styles: int, seeds: int) -> Iterator[Arm]:
    for seed, style in itertools.product(range(seeds), list(HELD_OUT_STYLES)[:styles]):
        yield Arm(style, seed)


def report(out: Path) -> str:
    """Means with half the 95 % interval over the teachers."""
    rows: list[dict[str, Any]] = [row["scores"] for row in read(out)]
    names = ["base", "teacher", *(f"{name} {step}" for name in STUDENTS for step in STEPS)]
    scores = ("style", "subject", "distance")
    lines = [f"{len(rows)} teachers", f"{'':18}" + "".join(f"{score:>18}" for score in scores)]
    for name in names:
        cells = [shown([row[name][score] for row in rows if score in row.get(name, {})]) for score in scores]
        lines.append(f"{name:18}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--styles", type=int, default=3, help="how many of the styles that the model has never seen")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    if not options.report:
        run(options.out, list(arms(options.styles, options.seeds)), measure, options.workers)
    print(report(options.out))


if __name__ == "__main__":
    main()
