"""How well negative prompts inside attention keep an attribute out of pictures, and what they cost in the others.

    COMFYUI_PATH=… python benchmarks/negative_prompts.py --pictures 40 --figure docs/negative_prompts.png
    COMFYUI_PATH=… python benchmarks/negative_prompts.py --student --pictures 100 --figure docs/negative_one_step.png

On the embedded model, with ComfyUI's own Python. The prompt names a subject and a palette; outlines in ink, which are
left open, are unwanted. An oracle tells how many pictures are free of them, and how many still have the subject and
palette. All pictures have a guidance scale, against an empty prompt. Beside the methods stands the usual way: the
unwanted word as the negative prompt of classifier-free guidance. ``--student`` draws with the one-step student
instead: one call of the model for each picture, no guidance, and two calls for the usual way, at a scale of 1.5.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comfyui import open_comfyui, why_absent
from package import load_package

load_package()

import torch  # noqa: E402

from stylewright.training.metrics import mean_interval  # noqa: E402

STEPS, CFG, SIDE = 16, 3.0, 16
STUDENTS_CFG = 1.5  # SNOOPI stacks it on students, too, and finds it harmful
UNWANTED = ("edge", "inked")
SCALES = {"nasa": (0.1, 0.2, 0.4, 0.8), "nag": (1.0, 2.0, 4.0, 8.0), "vsf": (0.5, 1.0, 2.0, 4.0)}


@dataclass(frozen=True)
class Row:
    method: str  # "none", "cfg", or one of attention's
    scale: float
    free: tuple[float, float]  # share and half its 95 % interval
    subject: tuple[float, float]
    palette: tuple[float, float]


class Painter:
    """Draws with the embedded model in ComfyUI, always the same noise and prompts."""

    def __init__(self, pictures: int, student: bool) -> None:
        from stylewright.nodes.bridge.embedded import load_embedded
        from stylewright.training.embedded.oracle import load_oracle
        from stylewright.training.embedded.renderer import PALETTES, SEEN_PALETTES, SUBJECTS
        from stylewright.training.embedded.weights import Weights

        with torch.inference_mode():
            loaded = load_embedded(one_step=student)
        self.student = student
        self.model, self.clip, self.vae = loaded.model, loaded.clip, loaded.vae
        self.oracle = load_oracle(Weights().oracle)
        self.subjects = [number % len(SUBJECTS) for number in range(pictures)]
        self.palettes = [(7 * number) % SEEN_PALETTES for number in range(pictures)]
        names = tuple(PALETTES)
        self.prompts = [
            f"{SUBJECTS[subject]} in {names[palette]} style"
            for subject, palette in zip(self.subjects, self.palettes, strict=True)
        ]

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def row(self, method: str, scale: float) -> Row:
        from stylewright.nodes.bridge.negative import apply
        from stylewright.training.attention_guidance import AttentionGuidance
        from stylewright.training.embedded.renderer import ATTRIBUTES

        with torch.inference_mode():
            unwanted = self.encode(f"{UNWANTED[1]} style")
            none = None if self.student else self.encode("")
            model = self.model
            if method in SCALES:
                model = apply(model, unwanted, AttentionGuidance(method, scale))
            pictures = torch.cat(
                [
                    self.draw(model, prompt, unwanted if method == "cfg" else none, seed)
                    for seed, prompt in enumerate(self.prompts)
                ]
            )
            seen = {name: logits.argmax(1) for name, logits in self.oracle(pictures).items()}
        unwanted_class = ATTRIBUTES[UNWANTED[0]].index(UNWANTED[1])
        return Row(
            method,
            scale,
            share(seen[UNWANTED[0]] != unwanted_class),
            share(seen["subject"] == torch.tensor(self.subjects)),
            share(seen["palette"] == torch.tensor(self.palettes)),
        )

    def draw(self, model: Any, prompt: str, negative: list | None, seed: int) -> torch.Tensor:
        """A picture (1, 3, h, w)."""
        import comfy.sample

        empty = torch.zeros(1, 16, SIDE, SIDE)
        if self.student:
            from stylewright.nodes.bridge.one_step import draw
            from stylewright.nodes.bridge.one_step_plan import OF_STUDENT, Wishes, plan

            made = plan(model, Wishes(OF_STUDENT))
            scale = 1.0 if negative is None else STUDENTS_CFG
            positive, latent = self.encode(prompt), {"samples": empty}
            latent = draw(model, positive, negative, scale, latent, seed, made.sampler, made.sigmas)["samples"]
            return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)
        noise = comfy.sample.prepare_noise(empty, seed)
        latent = comfy.sample.sample(
            model, noise, STEPS, CFG, "euler", "simple", self.encode(prompt), negative, empty,
            disable_pbar=True, seed=seed,
        )  # fmt: skip
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)


def share(right: torch.Tensor) -> tuple[float, float]:
    found = mean_interval(right.float())
    return found.mean, found.high - found.mean


def kept(row: Row) -> float:
    return min(row.subject[0], row.palette[0])


def plot(rows: list[Row], path: Path) -> None:
    """Free of the attribute against the scale, and what is kept against that."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    none = next(row for row in rows if row.method == "none")
    for method in SCALES:
        own = [row for row in rows if row.method == method]
        scales = [row.scale for row in own]
        left.errorbar(scales, [row.free[0] for row in own], [row.free[1] for row in own], marker="o", label=method)
        right.plot([row.free[0] for row in (none, *own)], [kept(row) for row in (none, *own)], "o-", label=method)
    left.axhline(none.free[0], color="0.5", linestyle=":", label="no negative")
    for row in rows:
        if row.method == "cfg":
            left.axhline(row.free[0], color="0.5", linestyle="--", label="negative of CFG")
            right.plot([row.free[0]], [kept(row)], "k*", ms=10, label="negative of CFG")
    left.set(xscale="log", xlabel="scale", ylabel=f"pictures without {UNWANTED[1]} outlines", ylim=(0, 1.02))
    right.set(
        xlabel=f"pictures without {UNWANTED[1]} outlines",
        ylabel="subject and palette kept (the lesser)",
        ylim=(0, 1.02),
    )
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=40, help="of each row")
    parser.add_argument("--student", action="store_true", help="the one-step student instead")
    parser.add_argument("--figure", type=Path, help="where to write the figure")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    given = parser.parse_args()
    if reason := why_absent():
        print(f"nothing to do: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        open_comfyui(Path(base), "cpu")
        painter, rows = Painter(given.pictures, given.student), []
        plans = [
            ("none", 0.0),
            ("cfg", STUDENTS_CFG if given.student else CFG),
            *((method, scale) for method in SCALES for scale in SCALES[method]),
        ]
        for method, scale in plans:
            rows.append(painter.row(method, scale))
            print(line(rows[-1]), file=sys.stderr)
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(f"| method | scale | without {UNWANTED[1]} outlines | subject | palette |\n" + "| --- " * 5 + "|")
        print("\n".join(line(row) for row in rows))
    if given.figure:
        plot(rows, given.figure)
    return 0


def line(row: Row) -> str:
    cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in (row.free, row.subject, row.palette)]
    return f"| {row.method} | {row.scale:g} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
