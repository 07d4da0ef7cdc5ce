"""Last stage: the model card, with figures measured on the weights beside it."""

from pathlib import Path

from ...formats.state import write_atomically
from ...metrics import Interval
from ..autoencoder import load_autoencoder
from ..evaluate import PROMPT_SETS, figures, judge, judge_truth
from ..oracle import load_oracle
from ..weights import Weights
from .autoencoder import psnr
from .oracle import accuracy

BEST_GUIDANCE = 5.0
OTHER_GUIDANCE = (1.0, 3.0)  # measured on a fifth of the pictures


def write_card(weights: Weights, *, seed: int = 0, n: int = 500) -> None:
    """Measures the model and writes ``README.md`` beside its weights.

    n pictures for each kind of prompt at the best guidance, a fifth of that at the others and of the truth.
    """
    from ...hosts.embedded import load_embedded

    host, oracle = load_embedded(weights), load_oracle(weights.oracle)
    rows: dict[str, dict[str, Interval]] = {}
    for name, prompts in PROMPT_SETS.items():
        for scale, count in ((BEST_GUIDANCE, n), *((scale, max(1, n // 5)) for scale in OTHER_GUIDANCE)):
            scores = judge(host, oracle, prompts(count, seed), seed=seed, guidance_scale=scale)
            rows[f"{name}, guidance {scale:g}, n = {count}"] = figures(scores)
        count = max(1, n // 5)
        rows[f"{name}, the truth, n = {count}"] = figures(judge_truth(host, oracle, prompts(count, seed), seed=seed))
    text = CARD.format(
        sizes="\n".join(f"| `{path.name}` | {path.stat().st_size / 1e6:.1f} MB |" for path in _files(weights)),
        psnr=psnr(load_autoencoder(weights.autoencoder), seed),
        oracle=", ".join(f"{name} {share:.3f}" for name, share in accuracy(oracle, seed).items()),
        table=_table(rows),
    )
    write_atomically(weights.folder / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _files(weights: Weights) -> list[Path]:
    return [weights.transformer, weights.text_encoder, weights.autoencoder, weights.oracle]


def _table(rows: dict[str, dict[str, Interval]]) -> str:
    heads = list(next(iter(rows.values())))
    lines = [f"| prompts | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for name, values in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{value.mean:.3f}" for value in values.values()) + " |")
    return "\n".join(lines)


CARD = """# The embedded model

A small FLUX (width 256, 2 double and 4 single blocks, 9.1 million parameters) that draws ten subjects in composable
styles at 128x128, with its autoencoder (TAESD's layout, 16 channels), a word-level text encoder, and the oracle that
scores its pictures. Apache-2.0; trained on pictures drawn by `training/embedded/renderer.py` and on nothing else.

Rebuild from nothing: `stylewright embedded build --out FOLDER`. Measure again: `stylewright embedded card`.

| file | size |
| --- | --- |
{sizes}

Autoencoder: PSNR {psnr:.1f} dB on 64 pictures that training did not see.
Oracle, share of right answers on 1000 unseen renders: {oracle}.

Share of pictures in which the oracle sees what the prompt asked for, at 20 steps. At n = 500 the 95 % interval of a
share of 0.95 reaches 0.02 to either side, at n = 100 it reaches 0.04. "The truth" is the renderer's own picture of the
prompt through the autoencoder: no model can be expected to score more. (In one of the named styles the outlines are as
black as ink, so that crisp and inked edges are all but the same picture.)

{table}
"""
