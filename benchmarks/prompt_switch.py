"""When style and subject are decided in the denoising: on the embedded model, where an oracle sees both.

After Fig. 4 of arXiv 2411.14793: the prompt is exchanged once on the way, after so many of the steps. Words that are
there *until* the exchange decide what is settled by then, words that are there *from* it on what is still open.

    python benchmarks/prompt_switch.py --pictures 100 --figure docs/prompt_switch.png

Every row has the same prompts (known styles by their words, subjects in turn), noise and steps.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from package import load_package

load_package()

import torch  # noqa: E402

from stylewright.training.denoiser import Conditioning  # noqa: E402
from stylewright.training.embedded.evaluate import Prompt, by_words  # noqa: E402
from stylewright.training.embedded.oracle import Oracle, load_oracle, score  # noqa: E402
from stylewright.training.embedded.renderer import SUBJECTS  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.hosts.generate import generate  # noqa: E402
from stylewright.training.hosts.host import Host  # noqa: E402
from stylewright.training.metrics import mean_interval  # noqa: E402
from stylewright.training.switching import Switch  # noqa: E402

STEPS = 20
AFTER = (1, 2, 3, 4, 6, 8, 12)  # steps before the exchange
GUIDANCE = 3.0


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """A denoiser that is told ``others`` instead of its conditioning on one side of a threshold."""

    inner: Any
    switch: Switch
    others: Conditioning
    told: Conditioning
    first: bool  # whether the others are the noisier side's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, x_t: torch.Tensor, log_snr: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        noisy, clean = self.switch.weights(float(log_snr[0]))
        is_prompt = conditioning["context"] is self.told["context"]
        exchanged = is_prompt and (noisy if self.first else clean)
        return self.inner(x_t, log_snr, self.others if exchanged else conditioning)


def drawn(host: Host, prompts: Sequence[str], others: Sequence[str], after: int, *, first: bool) -> torch.Tensor:
    """Pictures of the prompts, with the others in their place before (``first``) or after so many steps."""
    levels = host.schedule(STEPS, (host.resolution // host.pixels_per_token) ** 2)
    middle = float((levels[after - 1 : after + 1]).clamp(-30, 30).mean())
    told = host.encode_prompts(list(prompts))
    denoiser = Exchanged(host.denoiser, Switch((middle,)), host.encode_prompts(list(others)), told, first)
    once = {tuple(prompts): told}

    def encode(texts: list[str]) -> Conditioning:
        return once.get(tuple(texts)) or host.encode_prompts(texts)

    switched = dataclasses.replace(host, denoiser=denoiser, encode_prompts=encode)
    return generate(switched, list(prompts), seed=0, steps=STEPS, guidance_scale=GUIDANCE)


def scores(oracle: Oracle, pictures: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Per picture: share of the style's four attributes, and whether the subject is right."""
    found = score(oracle, pictures, torch.tensor([each.subject for each in prompts]), [each.style for each in prompts])
    return {"style": found.style_share, "subject": found.subject.float()}


def measured(host: Host, oracle: Oracle, pictures: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores of the whole prompt and of none of the words in question, and a row for each number of steps."""
    prompts = by_words(pictures, 0)
    whole = [each.text for each in prompts]
    without = {
        "style": [SUBJECTS[each.subject] for each in prompts],
        "subject": [text.split(" in ", 1)[1] for text in whole],
    }

    def of(what: str, drawn_pictures: torch.Tensor) -> Any:
        return mean_interval(scores(oracle, drawn_pictures, prompts)[what])

    plain = {"whole": whole, **{f"without {what}": texts for what, texts in without.items()}}
    ends = {
        name: {what: of(what, generate(host, texts, seed=0, steps=STEPS, guidance_scale=GUIDANCE)) for what in without}
        for name, texts in plain.items()
    }
    rows = []
    levels = host.schedule(STEPS, (host.resolution // host.pixels_per_token) ** 2)
    for after in AFTER:
        row: dict[str, Any] = {"after": after, "log_snr": float(levels[after])}
        for what, texts in without.items():
            row[f"{what} until"] = of(what, drawn(host, whole, texts, after, first=False))
            row[f"{what} from"] = of(what, drawn(host, whole, texts, after, first=True))
        rows.append(row)
        print(line(row), file=sys.stderr)
    return ends, rows


def line(row: dict[str, Any]) -> str:
    cells = [interval(row[name]) for name in ("style until", "style from", "subject until", "subject from")]
    return f"| {row['after']} of {STEPS} | {row['log_snr']:.2f} | {' | '.join(cells)} |"


def interval(found: Any) -> str:
    return f"{found.mean:.2f} ± {found.high - found.mean:.2f}"


def plot(ends: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Style and subject against the level at which the prompt is exchanged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    levels = [row["log_snr"] for row in rows]
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("style", "subject"), strict=True):
        for when, colour in (("until", "tab:blue"), ("from", "tab:orange")):
            found = [row[f"{what} {when}"] for row in rows]
            errors = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
            label = f"{what} named only {'up to' if when == 'until' else 'after'} this level"
            axes.errorbar(levels, [each.mean for each in found], errors, color=colour, marker="o", ms=4, label=label)
        axes.axhline(ends["whole"][what].mean, color="0.5", linestyle="--", label="named throughout")
        axes.axhline(ends[f"without {what}"][what].mean, color="0.5", linestyle=":", label="never named")
        axes.set(xlabel="log-SNR of the exchange (left: noise)", title=what, ylim=(0, 1.02))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100, help="of each row")
    parser.add_argument("--figure", type=Path, help="where to write the figure")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ends, rows = measured(load_embedded(), load_oracle(Weights().oracle), given.pictures)
    print("| exchanged after | log_snr | style until | style from | subject until | subject from |")
    print("| --- " * 6 + "|")
    for row in rows:
        print(line(row))
    for name, found in ends.items():
        print(f"{name}: style {interval(found['style'])}, subject {interval(found['subject'])}")
    if given.figure:
        plot(ends, rows, given.figure)


if __name__ == "__main__":
    main()
