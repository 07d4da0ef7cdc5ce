"""One-step students of a style, on the embedded model: the plain student with a style's LoRA on top, or one distilled
from the model that wears the style.

The teacher is the embedded model with a LoRA that has learned a style from one picture. What is drawn in one step, of
subjects that the picture does not show:

style alone        by the teacher itself, called once
student and style  by the student that ships with the model, its LoRA and the style's on it together
from style         by a student distilled from the teacher (``--teacher-adapter``), which begins as the teacher
from both          the same, which begins as student and style together

Style is the share of the four attributes that the oracle sees, which forgives much, and subject the share of pictures
that show it. Distance is that of 5 x 5 patches to the teacher's (sliced Wasserstein), in parts of what the style alone
has.

    python benchmarks/style_student.py --out styles            runs what is missing, then prints the table
    python benchmarks/style_student.py --out styles --report   prints the table of what is there
    … --figure styles.png                                      draws the pictures of one style, in a run of its own
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from package import load_package

load_package()

import torch  # noqa: E402
from student_curves import table  # noqa: E402
from sweep import read, run, shown  # noqa: E402
from torch import Tensor  # noqa: E402

from stylewright.training.adapters.attach import attached  # noqa: E402
from stylewright.training.adapters.methods import AdapterConfig  # noqa: E402
from stylewright.training.clocks import log_snr_at  # noqa: E402
from stylewright.training.data.encoding import encode  # noqa: E402
from stylewright.training.data.items import items_from_memory  # noqa: E402
from stylewright.training.data.prompts import Prompts  # noqa: E402
from stylewright.training.demo.experiment import FREE_WORD, LAWS, RECIPE  # noqa: E402
from stylewright.training.demo.scoring import oracle_judge, other_subjects  # noqa: E402
from stylewright.training.distillation import DMD  # noqa: E402
from stylewright.training.embedded.oracle import Oracle, load_oracle  # noqa: E402
from stylewright.training.embedded.renderer import HELD_OUT_STYLES, SUBJECTS, render, scene_of  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.formats.adapters import LoadedAdapter, load_adapter  # noqa: E402
from stylewright.training.formats.starting import Start  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.generate import generate  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.loops.distil import distil  # noqa: E402
from stylewright.training.loops.distil_config import DistilConfig  # noqa: E402
from stylewright.training.loops.networks import Worn  # noqa: E402
from stylewright.training.loops.train import train  # noqa: E402
from stylewright.training.metrics import patches, sliced_wasserstein  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

STYLE_STEPS, SHOWN = 60, "star"
NOISES, DRAWING_STEPS, GUIDANCE = 4, 16, 3.0
SCORES = ("style", "subject", "distance")
DISTILLED = DistilConfig(
    steps=100,
    batch_size=8,
    learning_rate=3e-4,
    ema_decay=0.95,
    convention=DMD,
    guidance_low=2.0,
    precision="bfloat16",
    save_every=0,
    sample_every=50,
)


@dataclasses.dataclass(frozen=True)
class Arm:
    style: str
    seed: int


@functools.cache
def model() -> tuple[Host, Oracle]:
    """What draws and what judges, loaded once a process. One thread: the work is shared out by runs."""
    torch.set_num_threads(1)
    return load_embedded(), load_oracle(Weights().oracle)


def subjects() -> list[int]:
    return other_subjects(SUBJECTS.index(SHOWN))


def drawn(host: Host, seed: int, **how: Any) -> Tensor:
    prompts = [f"{SUBJECTS[i]} in {FREE_WORD} style" for i in subjects()]
    return generate(host, prompts * NOISES, seed=seed, **how)


def learned(host: Host, arm: Arm, folder: Path) -> LoadedAdapter:
    """The style of one picture."""
    picture = render(
        scene_of(
            torch.tensor([SUBJECTS.index(SHOWN)]),
            HELD_OUT_STYLES[arm.style],
            generator(arm.seed, "reference", arm.style),
        )
    )[0]
    data = encode(items_from_memory([picture], SHOWN), host, resolution=host.resolution, style_phrase=FREE_WORD)
    config = dataclasses.replace(RECIPE, steps=STYLE_STEPS, seed=arm.seed, density=LAWS["style-friendly"])
    result = train(host.denoiser, data, config, run_dir=folder)
    return load_adapter(result.path, "diffusers")


def together(*adapters: LoadedAdapter) -> LoadedAdapter:
    """The sum of LoRAs, as one of scale 1."""
    first, state = adapters[0], {}
    for layer in dict.fromkeys(name for each in adapters for name in each.names):
        mine = [each for each in adapters if layer in each.names]
        ends = [[each.state[f"{layer}.lora_{end}.weight"] for each in mine] for end in "AB"]
        scaled = [b * each.alpha / each.rank for b, each in zip(ends[1], mine, strict=True)]
        rank, lacking = sum(each.rank for each in adapters), sum(each.rank for each in adapters if each not in mine)
        a, b = torch.cat(ends[0]), torch.cat(scaled, 1)
        state[f"{layer}.lora_A.weight"] = torch.cat([a, a.new_zeros(lacking, a.shape[1])])
        state[f"{layer}.lora_B.weight"] = torch.cat([b, b.new_zeros(b.shape[0], lacking)], 1)
    names = tuple(dict.fromkeys(name for each in adapters for name in each.names))
    return dataclasses.replace(first, state=state, names=names, rank=rank, alpha=float(rank), about=None)


def measure(arm: Arm, keep: Callable[[str, Tensor], None] = lambda name, pictures: None) -> dict[str, Any]:
    """Style and subject of each way, by iterations where they are distilled. ``keep`` gets the pictures."""
    host, oracle = model()
    judge = oracle_judge(oracle, HELD_OUT_STYLES[arm.style])
    called = log_snr_at(host.denoiser.clock, torch.tensor([1.0]))
    found: dict[str, Any] = {}

    texture: dict[str, Tensor] = {}

    def note(name: str, pictures: Tensor) -> None:
        texture[name] = patches(pictures, 5, stride=3)
        distance = sliced_wasserstein(texture[name], texture["teacher"], generator(0, "texture"))
        found[name] = {**dataclasses.asdict(judge(pictures, subjects() * NOISES)), "distance": distance}
        keep(name, pictures)
        print(arm, name, found[name], file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        style = learned(host, arm, Path(folder))
    student = load_adapter(Weights().student, "diffusers")
    both = together(student, style)
    for name, adapter, how in (
        ("teacher", style, {"guidance_scale": GUIDANCE, "steps": DRAWING_STEPS}),
        ("teacher, other noise", style, {"guidance_scale": GUIDANCE, "steps": DRAWING_STEPS, "first": 100}),
        ("style alone", style, {"one_step": called}),
        ("student and style", both, {"one_step": called}),
    ):
        worn = Worn(name, adapter)
        with attached(host.denoiser.module, worn.config, family=host.denoiser.family, seed=0) as put:
            put.load_state_dict(adapter.state)
            note(name, drawn(host, arm.seed, **how))
    start = Start("both", both.state, both.names, "begins with both")
    for name, begun, rank in (("from style", None, 64), ("from both", start, both.rank)):
        config = dataclasses.replace(DISTILLED, seed=arm.seed, adapter=AdapterConfig(rank=rank, targets="all"))

        def sample(step: int, name: str = name) -> None:
            note(f"{name}, {step}", drawn(host, arm.seed, one_step=called))

        distil(
            host.denoiser,
            Prompts(tuple(f"{subject} in {FREE_WORD} style" for subject in SUBJECTS)),
            host.encode_prompts,
            config,
            latent_size=(host.latent_channels, *[host.resolution // host.pixels_per_latent] * 2),
            run_dir=None,
            sample=sample,
            start=begun,
            worn=Worn(arm.style, style),
        )
    unit = found["style alone"]["distance"]
    return {name: {**scores, "distance": scores["distance"] / unit} for name, scores in found.items()}


def arms(seeds: int) -> Iterator[Arm]:
    for seed, style in itertools.product(range(seeds), HELD_OUT_STYLES):
        yield Arm(style, seed)


def report(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["scores"]) if rows else []
    lines = [[name, *(shown([row["scores"][name][score] for row in rows]) for score in SCORES)] for name in names]
    head = f"{len(rows)} runs; mean and half the 95 % interval"
    return "\n".join([head, "", *table(("drawn by", *SCORES), lines)])


def draw_figure(kept: dict[str, Tensor], path: Path) -> None:
    """A row of pictures for each way."""
    from matplotlib.figure import Figure

    columns = len(subjects())
    figure = Figure(figsize=(1.1 * columns + 2, 1.15 * len(kept)), layout="constrained")
    axes = figure.subplots(len(kept), columns)
    for line, (name, pictures) in zip(axes, kept.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for place, picture in zip(line, pictures, strict=False):
            place.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            place.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of each style")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--figure", type=Path, help="draw the first style, in a run of its own")
    options = parser.parse_args()
    if options.figure:
        kept: dict[str, Tensor] = {}
        measure(next(arms(1)), lambda name, pictures: kept.update({name: pictures.cpu()}))
        draw_figure(kept, options.figure)
        return
    if not options.report:
        run(options.out, list(arms(options.seeds)), measure, options.workers)
    print(report(read(options.out)))


if __name__ == "__main__":
    main()
