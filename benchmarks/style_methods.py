"""LoRA, StyleInject, FineStyle and DCO on one reference each, where the right picture is known.

The reference shows two or three subjects in a style that the embedded model has never seen, so that there is something
to leak: a subject that comes along where no prompt names it. Every method has the same steps and, but for rounding, the
same number of parameters. Afterwards each draws the subjects that the reference does not show, twice.

style     share of the four attributes (palette, ground, fill, edge) that are the reference's; the oracle
subject   share of pictures in which the asked subject is the one that the oracle sees
leakage   how likely a subject of the reference is in the picture, the mean over pictures; ``presence.py``
both      harmonic mean of style and subject

    python benchmarks/style_methods.py --out methods            runs what is missing, then prints the tables
    python benchmarks/style_methods.py --out methods --report   prints the tables of what is there
    … --figure methods.png                                      and draws them
    … --forms           StyleInject's forms and numbers of branches, on three styles with two seeds

Every finished run is a line of ``runs.jsonl``. The rates are each method's best of three on two further styles
(``--rates``). FineStyle's adapters sit on keys and values; its crops are those of the subjects' true boxes, as a user
gives them by masks.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from package import load_package

load_package()

import torch  # noqa: E402
from presence import Presence, load_presence  # noqa: E402
from sweep import read, run, shown  # noqa: E402

from stylewright.training.adapters.attach import attached  # noqa: E402
from stylewright.training.adapters.methods import AdapterConfig  # noqa: E402
from stylewright.training.concepts.boxes import Box, BoxOptions, as_crop  # noqa: E402
from stylewright.training.concepts.crops import CropOptions, crops_of, items_of  # noqa: E402
from stylewright.training.concepts.phrases import Phrases  # noqa: E402
from stylewright.training.data.captions import styled  # noqa: E402
from stylewright.training.data.encoding import encode  # noqa: E402
from stylewright.training.data.items import Item  # noqa: E402
from stylewright.training.density_presets import DensityConfig  # noqa: E402
from stylewright.training.embedded.oracle import Oracle, load_oracle, score  # noqa: E402
from stylewright.training.embedded.renderer import HELD_OUT_STYLES, SIZE, SUBJECTS  # noqa: E402
from stylewright.training.embedded.several import Several, several  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.guidance import Guidance, cfg, finestyle  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.generate import generate  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.loops.config import TrainConfig  # noqa: E402
from stylewright.training.loops.train import train  # noqa: E402
from stylewright.training.metrics import harmonic_mean, leakage, mean_interval  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

FREE_WORD = "<v0>"
STYLES = list(HELD_OUT_STYLES)
TESTED, TUNED = STYLES[:6], STYLES[6:]
STYLE_FRIENDLY = DensityConfig("style-friendly", reference_tokens=4096)  # carried to 64 tokens: N(-1.84, 2^2)
SD3 = DensityConfig("sd3", reference_tokens=4096)
RATES, RATE_STEPS = (1e-3, 2e-3, 4e-3), 40
RATED = ("LoRA", "StyleInject", "FineStyle, no scaling", "DCO")  # the others have theirs
GRID = tuple(itertools.product((0.0, 0.5, 1.0, 2.0), (1.0, 2.0, 4.0)))  # of l1 and l2
GUIDANCE, SAMPLING_STEPS, TWICE = 3.0, 12, 2
RECIPE = TrainConfig(
    steps=60,
    batch_size=4,
    accumulation=1,
    style_phrase=FREE_WORD,
    density=STYLE_FRIENDLY,
    save_every=0,
)


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained, and on what. The ranks make the parameters of all methods equal: see ``--parameters``."""

    adapter: AdapterConfig
    rate: float
    loss: str = "mse"
    density: DensityConfig = STYLE_FRIENDLY
    crops: bool = False


LORA = AdapterConfig(rank=8)
KEYS_AND_VALUES = AdapterConfig(rank=24, targets="kv_both")
METHODS = {
    "LoRA": Method(LORA, 1e-3),
    "StyleInject": Method(AdapterConfig(method="styleinject", rank=2), 4e-3),
    "FineStyle, no scaling": Method(KEYS_AND_VALUES, 1e-3),
    "FineStyle": Method(KEYS_AND_VALUES, 1e-3, crops=True),
    "DCO": Method(LORA, 1e-3, loss="dco"),
    "DCO, SD3's law": Method(LORA, 1e-3, loss="dco", density=SD3),
    "LoRA, SD3's law": Method(LORA, 1e-3, density=SD3),
}


def style_inject(rank: int, **options: Any) -> Method:
    return Method(AdapterConfig(method="styleinject", rank=rank, **options), METHODS["StyleInject"].rate)


FORMS = {
    "StyleInject": METHODS["StyleInject"],  # f2c, 4 branches
    "f2": style_inject(2, injection="f2"),
    "f1": style_inject(2, injection="f1"),
    "LoRA-like": style_inject(2, injection="lora"),
    "2 branches": style_inject(4, branches=2),
    "8 branches": style_inject(1, branches=8),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run. ``rate`` 0 = the method's own."""

    style: str
    seed: int
    method: str
    rate: float = 0.0


def arms(seeds: int) -> Iterator[Arm]:
    for seed, style, method in itertools.product(range(seeds), TESTED, METHODS):
        yield Arm(style, seed, method)


def form_arms() -> Iterator[Arm]:
    for seed, style, form in itertools.product(range(2), TESTED[:3], FORMS):
        yield Arm(style, seed, form)


def rate_arms() -> Iterator[Arm]:
    for style, method, rate in itertools.product(TUNED, RATED, RATES):
        yield Arm(style, 0, method, rate)


@functools.cache
def model(presence: Path) -> tuple[Host, Oracle, Presence]:
    """What draws and what judges, loaded once a process. One thread: the work is shared out by runs."""
    torch.set_num_threads(1)
    return load_embedded(), load_oracle(Weights().oracle), load_presence(presence)


def reference_of(arm: Arm) -> Several:
    """Two or three subjects; the same for every method."""
    draw = generator(arm.seed, "reference", arm.style)
    count = 2 + int(torch.randint(2, (), generator=draw))
    return several(torch.randperm(len(SUBJECTS), generator=draw)[:count].tolist(), HELD_OUT_STYLES[arm.style], draw)


def items_for(reference: Several, method: Method, seed: int) -> list[Item]:
    phrases = Phrases(styled(reference.content, FREE_WORD), reference.subjects, (FREE_WORD,))
    boxes = {
        name: as_crop(Box(*box), SIZE, SIZE, BoxOptions())
        for name, box in zip(reference.subjects, reference.boxes.tolist(), strict=True)
    }
    crops = crops_of(boxes, SIZE, SIZE, CropOptions(), seed) if method.crops else []
    return items_of(reference.picture, phrases, crops, CropOptions())


def measure(presence: Path, arm: Arm) -> dict[str, dict[str, float]]:
    """Scores under CFG, and under every pair of scales of the grid for FineStyle with the first seed."""
    host, oracle, seer = model(presence)
    reference, method = reference_of(arm), (METHODS | FORMS)[arm.method]
    shown = [SUBJECTS.index(name) for name in reference.subjects]
    asked = [i for i in range(len(SUBJECTS)) if i not in shown] * TWICE
    prompts = [styled(SUBJECTS[i], FREE_WORD) for i in asked]

    def judged(**options: Any) -> dict[str, float]:
        pictures = generate(host, prompts, seed=arm.seed, steps=SAMPLING_STEPS, **options)
        return scores_of(pictures, asked, shown, reference, oracle, seer)

    config = dataclasses.replace(
        RECIPE,
        steps=RATE_STEPS if arm.rate else RECIPE.steps,
        seed=arm.seed,
        learning_rate=arm.rate or method.rate,
        loss=method.loss,
        density=method.density,
        adapter=method.adapter,
    )
    dataset = encode(
        items_for(reference, method, arm.seed),
        host,
        resolution=host.resolution,
        style_phrase=FREE_WORD,
        caption_mode="full",
    )
    found = {"before": judged(guidance_scale=GUIDANCE)} if arm.method == next(iter(METHODS)) else {}
    trained = train(host.denoiser, dataset, config, run_dir=None)
    rules: dict[str, Guidance] = {"cfg": cfg(GUIDANCE)}
    if arm.method == "FineStyle" and not arm.rate and not arm.seed:
        rules |= {f"{l1:g} {l2:g}": finestyle(l1, l2) for l1, l2 in GRID}
    with attached(host.denoiser.module, config.adapter, family=host.denoiser.family, seed=arm.seed) as adapter:
        adapter.load_state_dict(trained.adapter_state)
        return found | {name: judged(guidance=rule, adapter=adapter) for name, rule in rules.items()}


def scores_of(
    pictures: torch.Tensor, asked: list[int], shown: list[int], reference: Several, oracle: Oracle, seer: Presence
) -> dict[str, float]:
    scores = score(oracle, pictures, torch.tensor(asked), [reference.style] * len(asked))
    subjects = torch.arange(len(SUBJECTS))
    named = torch.tensor(asked)[:, None] == subjects
    leaked = leakage(seer(pictures), torch.isin(subjects, torch.tensor(shown)), named)
    style, subject = float(scores.style_share.mean()), float(scores.subject.float().mean())
    return {
        "style": style,
        "subject": subject,
        "leakage": float(leaked.mean()),
        "both": float(harmonic_mean(style, subject)),
    }


SCORES = ("style", "subject", "both", "leakage")


def values(rows: list[dict[str, Any]], method: str, rule: str, name: str) -> dict[tuple[str, int], float]:
    """One score of the runs of a method, by style and seed."""
    mine = [row for row in rows if row["arm"]["method"] == method and not row["arm"]["rate"] and rule in row["scores"]]
    return {(row["arm"]["style"], row["arm"]["seed"]): row["scores"][rule][name] for row in mine}


def row(label: str, cells: Iterable[str]) -> str:
    return f"{label:24}" + "".join(f"{cell:>16}" for cell in cells)


def compared(rows: list[dict[str, Any]], methods: Sequence[str], places: Container[tuple[str, int]]) -> Iterator[str]:
    """A row of means a method, of the runs at these places, then differences to the first method in pairs."""
    scores = {
        method: [{at: one for at, one in values(rows, method, "cfg", name).items() if at in places} for name in SCORES]
        for method in methods
    }
    for method in methods:
        yield row(method, (shown(list(each.values())) for each in scores[method]))
    yield from ("", f"less {methods[0]}, run by run")
    for method in methods[1:]:
        pairs = zip(scores[method], scores[methods[0]], strict=True)
        yield row(method, (shown([mine[at] - base[at] for at in mine.keys() & base.keys()]) for mine, base in pairs))


def report(out: Path) -> str:
    """Means with 95 % intervals over styles and seeds, differences to LoRA in pairs, and the grid."""
    rows, methods = read(out), list(METHODS)
    count = sum(not each["arm"]["rate"] and each["arm"]["method"] in METHODS for each in rows)
    everywhere = {place for method in methods for place in values(rows, method, "cfg", "style")}
    before = [values(rows, methods[0], "before", name) for name in SCORES]
    lines = [f"{count} runs of {RECIPE.steps} steps; mean and half the 95 % interval over styles and seeds", ""]
    lines += [row("", SCORES), row("before", (shown(list(each.values())) for each in before))]
    lines += [*compared(rows, methods, everywhere), "", "FineStyle's two scales, first seed"]
    for l1, l2 in GRID:
        found = [values(rows, "FineStyle", f"{l1:g} {l2:g}", name) for name in SCORES]
        lines.append(row(f"l1 {l1:<4g} l2 {l2:g}", (shown(list(each.values())) for each in found)))
    return "\n".join(lines)


def report_forms(out: Path) -> str:
    """Means of the forms over the styles and seeds that all of them have, and differences to the first in pairs."""
    rows, forms = read(out), list(FORMS)
    places = {(arm.style, arm.seed) for arm in form_arms()}
    places = places.intersection(*(values(rows, form, "cfg", "style") for form in forms))
    return "\n".join([f"{len(places)} runs of each", row("", SCORES), *compared(rows, forms, places)])


def report_rates(out: Path) -> str:
    lines = ["style / subject by rate, mean of two styles", f"{'':24}" + "".join(f"{rate:>14g}" for rate in RATES)]
    for method in RATED:
        cells = []
        for rate in RATES:
            asked = {"method": method, "rate": rate}.items()
            mine = [each["scores"]["cfg"] for each in read(out) if asked <= each["arm"].items()]
            means = (f"{sum(each[name] for each in mine) / len(mine):.2f}" for name in ("style", "subject"))
            cells.append(" / ".join(means) if mine else "-")
        lines.append(f"{method:24}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def draw(out: Path, path: Path) -> None:
    """Methods by subject and style, by leakage, and the grid of the two scales."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = read(out)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    points = [(method, "cfg", method) for method in METHODS]
    points.append(("FineStyle", "1 2", "FineStyle, guided by l1 = 1, l2 = 2 (first seed)"))
    for number, (method, rule, label) in enumerate(points):
        colour = colormaps["tab10"](number)
        found = {name: mean_interval(list(values(rows, method, rule, name).values())) for name in SCORES}
        half = {name: [[i.mean - i.low], [i.high - i.mean]] for name, i in found.items()}
        x, y, z = (found[name].mean for name in ("subject", "style", "leakage"))
        left.errorbar(x, y, half["style"], half["subject"], fmt="o", color=colour, label=label, capsize=2)
        middle.errorbar(z, y, half["style"], half["leakage"], fmt="o", color=colour, capsize=2)
    left.set(xlabel="subject: the asked one is drawn", ylabel="style: as in the reference", ylim=(0.2, 1.15))
    middle.set(xlabel="leakage: a subject of the reference, unasked", ylabel="style", ylim=(0.2, 1.15))
    left.legend(fontsize=7, loc="upper left")
    for l2 in sorted({l2 for _, l2 in GRID}):
        scales = [l1 for l1, other in GRID if other == l2]
        for name, line in (("style", "-"), ("leakage", ":"), ("subject", "--")):
            means = [
                mean_interval(list(values(rows, "FineStyle", f"{l1:g} {l2:g}", name).values())).mean for l1 in scales
            ]
            colour = colormaps["viridis"](0.2 * l2)
            right.plot(scales, means, line, marker="o", markersize=3, color=colour, label=f"{name}, l2 = {l2:g}")
    right.set(xlabel="FineStyle's l1 (more of what the adapter changes)", ylim=(0, 1.1))
    right.legend(fontsize=7, ncols=3, loc="upper center")
    figure.savefig(path, dpi=110)


def parameters() -> str:
    host, lines = load_embedded(), []
    for name, method in (METHODS | FORMS).items():
        with attached(host.denoiser.module, method.adapter, family=host.denoiser.family, seed=0) as adapter:
            lines.append(f"{name:24} {sum(tensor.numel() for tensor in adapter.parameters()):>10}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--rates", action="store_true", help="only the rates, on two further styles")
    parser.add_argument("--forms", action="store_true", help="only StyleInject's forms and numbers of branches")
    parser.add_argument("--parameters", action="store_true", help="only how many parameters each method trains")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--figure", type=Path, help="draw it, too")
    options = parser.parse_args()
    if options.parameters:
        print(parameters())
        return
    if not options.report:
        presence = options.out / "presence.safetensors"
        load_presence(presence)  # once, not in each process
        wanted = list(form_arms() if options.forms else rate_arms() if options.rates else arms(options.seeds))
        run(options.out, wanted, functools.partial(measure, presence), options.workers)
    reports = report_forms if options.forms else report_rates if options.rates else report
    print(reports(options.out))
    if options.figure:
        draw(options.out, options.figure)


if __name__ == "__main__":
    main()
