"""How good the embedded model is: subjects and styles as the oracle sees them, for known and held-out styles."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..hosts.generate import generate
from ..hosts.host import Host
from ..metrics import Interval, mean_interval
from ..randomness import generator
from .oracle import Oracle, Scores, score
from .renderer import SUBJECTS, Style, held_out_combinations, render, scene_of
from .vocabulary import named_styles


@dataclass(frozen=True)
class Prompt:
    """A prompt and what the right picture shows."""

    text: str
    subject: int
    style: Style


def by_words(n: int, seed: int) -> list[Prompt]:
    """Known styles described by their four words."""
    return _prompts(n, seed, "words", [(" ".join(style.words), style) for style in named_styles().values()])


def by_name(n: int, seed: int) -> list[Prompt]:
    """Known styles called by their names."""
    return _prompts(n, seed, "names", list(named_styles().items()))


def unseen_combinations(n: int, seed: int) -> list[Prompt]:
    """Combinations of known attributes that pre-training never showed, by their words."""
    return _prompts(n, seed, "unseen", [(" ".join(style.words), style) for style in held_out_combinations()])


def _prompts(n: int, seed: int, kind: str, phrases: list[tuple[str, Style]]) -> list[Prompt]:
    """n prompts, subjects in turn, style phrases at random."""
    picks = torch.randint(len(phrases), (n,), generator=generator(seed, "prompts", kind)).tolist()
    rows = [(i % len(SUBJECTS), *phrases[k]) for i, k in enumerate(picks)]
    return [Prompt(f"{SUBJECTS[subject]} in {phrase} style", subject, style) for subject, phrase, style in rows]


PROMPT_SETS = {
    "known styles, by words": by_words,
    "known styles, by name": by_name,
    "unseen combinations": unseen_combinations,
}


def judge(
    host: Host,
    oracle: Oracle,
    prompts: list[Prompt],
    *,
    seed: int,
    guidance_scale: float = 1.0,
    steps: int = 20,
    one_step: Tensor | None = None,  # log_snr (1,) at which a student is called instead
) -> Scores:
    """Draws every prompt once and scores the pictures."""
    texts = [prompt.text for prompt in prompts]
    pictures = draw(host, texts, seed=seed, guidance_scale=guidance_scale, steps=steps, one_step=one_step)
    subjects = torch.tensor([prompt.subject for prompt in prompts])
    return score(oracle, pictures, subjects, [prompt.style for prompt in prompts])


def draw(
    host: Host,
    prompts: list[str],
    *,
    seed: int,
    guidance_scale: float = 1.0,
    steps: int = 20,
    one_step: Tensor | None = None,
    batch: int = 50,
) -> Tensor:
    """Pictures (n, 3, 128, 128) in [0, 1], drawn in batches whose size changes nothing."""

    def part(first: int) -> Tensor:
        chosen = prompts[first : first + batch]
        return generate(
            host, chosen, seed=seed, first=first, guidance_scale=guidance_scale, steps=steps, one_step=one_step
        )

    return torch.cat([part(first) for first in range(0, len(prompts), batch)])


def judge_truth(host: Host, oracle: Oracle, prompts: list[Prompt], *, seed: int, batch: int = 20) -> Scores:
    """Scores the renderer's own pictures of the prompts, through the autoencoder: what a perfect model would get."""
    pictures = []
    for i in range(0, len(prompts), batch):
        scenes = [
            scene_of(torch.tensor([prompt.subject]), prompt.style, generator(seed, "truth", i + k))
            for k, prompt in enumerate(prompts[i : i + batch])
        ]
        pictures.append(host.decode_latents(host.encode_images(torch.cat([render(scene) for scene in scenes]))))
    subjects = torch.tensor([prompt.subject for prompt in prompts])
    return score(oracle, torch.cat(pictures), subjects, [prompt.style for prompt in prompts])


def figures(scores: Scores) -> dict[str, Interval]:
    """Share of right answers by attribute, with its 95 % interval."""
    rows = {"subject": scores.subject, **scores.style, "whole style": scores.whole_style}
    rows["everything"] = scores.subject & scores.whole_style
    return {name: mean_interval(right.float()) for name, right in rows.items()}
