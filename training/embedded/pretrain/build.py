"""The whole rebuild: autoencoder, oracle, transformer and text encoder, decoder, model card."""

from collections.abc import Callable
from pathlib import Path

from ...formats.state import write_atomically
from ..weights import Weights
from .autoencoder import refine_decoder, train_autoencoder
from .card import write_card
from .oracle import train_oracle
from .transformer import train_transformer


def build(work: Path, out: Path, *, seed: int = 0, stages: tuple[str, ...] | None = None) -> None:
    """Runs the stages (None = all) in order. ``work`` holds checkpoints and latents, ``out`` gets the weights.

    On one machine with the same number of threads the result is the same every time. A stage that is finished is
    skipped, one that was interrupted continues. ValueError for an unknown stage, and where ``work`` belongs to
    another seed.
    """
    if unknown := [name for name in stages or () if name not in STAGES]:
        raise ValueError(f"unknown stage {unknown[0]!r}: expected some of {', '.join(STAGES)}")
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    _claim(work, seed)
    weights = Weights(out)
    for name in stages or STAGES:
        finished = work / f"{name}.done"
        if not finished.exists():
            STAGES[name](work, weights, seed)
            finished.touch()


def _claim(work: Path, seed: int) -> None:
    """Notes in ``work`` which seed it is for. ValueError where it is for another, whose files would be taken up."""
    note = work / "seed.txt"
    if not note.exists():
        write_atomically(note, lambda temporary: temporary.write_text(f"{seed}\n", encoding="utf-8"))
    elif (other := note.read_text(encoding="utf-8").strip()) != str(seed):
        raise ValueError(f"{work} holds the work for seed {other}: give another folder for seed {seed}, or empty it")


STAGES: dict[str, Callable[[Path, Weights, int], None]] = {
    "autoencoder": lambda work, weights, seed: train_autoencoder(work, weights.autoencoder, seed=seed),
    "oracle": lambda work, weights, seed: train_oracle(work, weights.oracle, seed=seed),
    "transformer": lambda work, weights, seed: train_transformer(work, weights.folder, seed=seed),
    "decoder": lambda work, weights, seed: refine_decoder(work, weights.autoencoder, seed=seed),
    "card": lambda work, weights, seed: write_card(weights, seed=seed),
}
