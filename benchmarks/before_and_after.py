"""What does learning a style do to everything else that the embedded model draws?

For each of some held-out styles a one-picture LoRA is trained by the demo's recipe under the style-friendly law. Scored
by the oracle before and after: the new style under its free word, on subjects that the picture does not show, and the
prompts of the model card, which have nothing to do with it.

    python benchmarks/before_and_after.py --styles 4 --pictures 60
"""

import argparse
import dataclasses
from typing import Any

from package import load_package

load_package()

import torch  # noqa: E402

from stylewright.training.data.encoding import encode  # noqa: E402
from stylewright.training.data.items import items_from_memory  # noqa: E402
from stylewright.training.demo.experiment import FREE_WORD, LAWS, RECIPE, DemoOptions  # noqa: E402
from stylewright.training.demo.scoring import other_subjects  # noqa: E402
from stylewright.training.embedded.evaluate import PROMPT_SETS, Prompt, figures, judge  # noqa: E402
from stylewright.training.embedded.oracle import Oracle, Scores, load_oracle  # noqa: E402
from stylewright.training.embedded.renderer import HELD_OUT_STYLES, SUBJECTS, Style, render, scene_of  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.loops.train import train  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

SHOWN = SUBJECTS.index(DemoOptions.subject)


def in_the_new_style(n: int, style: Style) -> list[Prompt]:
    subjects = other_subjects(SHOWN)
    rows = [subjects[i % len(subjects)] for i in range(n)]
    return [Prompt(f"{SUBJECTS[subject]} in {FREE_WORD} style", subject, style) for subject in rows]


def prompt_sets(n: int, seed: int, style: Style) -> dict[str, list[Prompt]]:
    return {"the new style": in_the_new_style(n, style)} | {name: of(n, seed) for name, of in PROMPT_SETS.items()}


def scored(host: Host, oracle: Oracle, sets: dict[str, list[Prompt]], seed: int) -> dict[str, Scores]:
    scale = host.guidance_scale
    return {name: judge(host, oracle, prompts, seed=seed, guidance_scale=scale) for name, prompts in sets.items()}


def learn(host: Host, name: str, seed: int, then: Any) -> None:
    """Learns a style from one picture and calls ``then`` while the adapter is on."""
    scene = scene_of(torch.tensor([SHOWN]), HELD_OUT_STYLES[name], generator(seed, "reference", name))
    items = items_from_memory([render(scene)[0]], DemoOptions.subject)
    dataset = encode(items, host, resolution=host.resolution, style_phrase=FREE_WORD)
    steps = DemoOptions.steps
    law = LAWS["style-friendly"]
    config = dataclasses.replace(RECIPE, steps=steps, sample_every=steps, seed=seed, density=law)

    def look(step: int) -> torch.Tensor:
        then()
        return torch.zeros(1, 3, 8, 8)

    train(host.denoiser, dataset, config, run_dir=None, sample=look)


def together(parts: list[Scores]) -> Scores:
    style = {name: torch.cat([part.style[name] for part in parts]) for name in parts[0].style}
    return Scores(torch.cat([part.subject for part in parts]), style)


def table(found: dict[str, dict[str, list[Scores]]]) -> str:
    lines = []
    for name in found["before"]:
        for when, sets in found.items():
            shares = figures(together(sets[name]))
            cells = [f"{share.mean:.3f} +-{share.high - share.mean:.3f}" for share in shares.values()]
            if not lines:
                lines.append(f"{'':38}" + "".join(f"{head:>16}" for head in shares))
            lines.append(f"{name + ', ' + when:38}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", type=int, default=4, help="how many held-out styles")
    parser.add_argument("--pictures", type=int, default=60, help="for each style and kind of prompt")
    options = parser.parse_args()
    host, oracle = load_embedded(), load_oracle(Weights().oracle)
    found: dict[str, dict[str, list[Scores]]] = {"before": {}, "after": {}}
    for seed, name in enumerate(list(HELD_OUT_STYLES)[: options.styles]):
        sets = prompt_sets(options.pictures, seed, HELD_OUT_STYLES[name])

        def keep(when: str, sets: dict[str, list[Prompt]] = sets, seed: int = seed) -> None:
            for kind, scores in scored(host, oracle, sets, seed).items():
                found[when].setdefault(kind, []).append(scores)

        keep("before")
        learn(host, name, seed, lambda: keep("after"))
    print(f"{options.styles} styles, {options.pictures} pictures each; mean and half the 95 % interval\n{table(found)}")


if __name__ == "__main__":
    main()
