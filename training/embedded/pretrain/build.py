"""The whole rebuild: oracle, autoencoder, transformer and text encoder, model card; each stage resumes."""

from collections.abc import Callable
from pathlib import Path

from ..weights import Weights
from .autoencoder import train_autoencoder
from .oracle import train_oracle
from .transformer import train_transformer


def build(work: Path, out: Path, *, seed: int = 0, stages: tuple[str, ...] | None = None) -> None:
    """Runs the stages (None = all) in order. ``work`` holds checkpoints and latents, ``out`` gets the weights.

    On one machine with the same number of threads the result is the same every time. A stage whose file is in
    ``out`` already is skipped.
    """
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    weights = Weights(out)
    done = {"autoencoder": weights.autoencoder, "oracle": weights.oracle, "transformer": weights.transformer}
    for name in stages or STAGES:
        if name not in STAGES:
            raise ValueError(f"unknown stage {name!r}: expected some of {', '.join(STAGES)}")
        if not done[name].exists():
            STAGES[name](work, weights, seed)


STAGES: dict[str, Callable[[Path, Weights, int], None]] = {
    "autoencoder": lambda work, weights, seed: train_autoencoder(work, weights.autoencoder, seed=seed),
    "oracle": lambda work, weights, seed: train_oracle(work, weights.oracle, seed=seed),
    "transformer": lambda work, weights, seed: train_transformer(work, weights.folder, seed=seed),
}
