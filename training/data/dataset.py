"""Encoded examples, and the batches of any step as a pure function of where the step is.

Examples of one shape (of latent and of conditioning) form a group, and a batch comes from one group. A longer
prompt is not padded to the length of another one: models without an attention mask would read the padding.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Conditioning
from ..randomness import generator
from .cache import digest, digest_named


@dataclass(frozen=True)
class Example:
    """One picture, encoded. float32 on the CPU."""

    name: str
    latent: Tensor  # (c, h, w)
    conditioning: Conditioning  # rows (1, …)
    mask: Tensor | None  # (1, h, w) in [0, 1]; None = the whole picture
    caption: str
    repeats: int = 1


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees."""

    latents: Tensor  # (b, c, h, w)
    conditioning: Conditioning  # (b, …)
    mask: Tensor | None  # (b, 1, h, w)
    captions: tuple[str, ...]  # "" where the caption was dropped


class Dataset:
    """Examples with repeats, in an endless order that depends on the seed alone.

    Each group is a stream of shuffled epochs, cut into batches that run on from one epoch into the next, so that
    none is smaller. Groups take turns so that all examples are seen at the same rate: after n draws from a group
    any two of its examples differ by at most one sight (times their repeats), and after a whole cycle of turns all
    examples of the dataset are even.
    """

    def __init__(self, examples: Sequence[Example], null: Conditioning, caption_dropout: float = 0.0) -> None:
        if not examples:
            raise ValueError("There are no examples to train on: give at least one")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"The caption dropout is {caption_dropout}, expected a share from 0 to 1")
        self.examples = tuple(examples)
        self.null = null  # conditioning of the empty prompt, (1, …)
        self.caption_dropout = caption_dropout
        self._groups = _group(self.examples)
        self._cycle = turns([len(group) for group in self._groups])

    def __len__(self) -> int:
        """Sights in an epoch: every example as often as it is repeated."""
        return sum(example.repeats for example in self.examples)

    def batch(self, seed: int, step: int, micro: int, batch_size: int, accumulation: int = 1) -> Batch:
        """The batch of one forward pass: ``micro`` of the ``accumulation`` passes of an optimizer step."""
        if batch_size < 1 or accumulation < 1:
            raise ValueError(f"Got batch size {batch_size} and accumulation {accumulation}: both are at least 1")
        if not (step >= 0 and 0 <= micro < accumulation):
            raise ValueError(f"Got pass {micro} of step {step}: expected a pass from 0 to {accumulation - 1}")
        group, turn = self._turn(step * accumulation + micro)
        picked = [self.examples[index] for index in self._draw(seed, group, turn * batch_size, batch_size)]
        dropped = self._dropped(seed, step, micro, picked)
        rows = [self.null if drop else example.conditioning for example, drop in zip(picked, dropped, strict=True)]
        return Batch(
            latents=torch.stack([example.latent for example in picked]),
            conditioning={name: torch.cat([row[name] for row in rows]) for name in rows[0]},
            mask=_stack_masks(picked),
            captions=tuple("" if drop else example.caption for example, drop in zip(picked, dropped, strict=True)),
        )

    def _turn(self, index: int) -> tuple[int, int]:
        """Whose turn the batch ``index`` of the run is, and how many turns that group had before."""
        cycles, place = divmod(index, len(self._cycle))
        group = self._cycle[place]
        return group, cycles * self._cycle.count(group) + self._cycle[:place].count(group)

    def _draw(self, seed: int, group: int, start: int, count: int) -> list[int]:
        """Examples ``start`` to ``start + count`` of a group's stream."""
        members = self._groups[group]
        epochs = range(start // len(members), (start + count - 1) // len(members) + 1)
        orders = [torch.randperm(len(members), generator=generator(seed, "epoch", group, k)).tolist() for k in epochs]
        stream = [members[place] for order in orders for place in order]
        first = start % len(members)
        return stream[first : first + count]

    def _dropped(self, seed: int, step: int, micro: int, picked: list[Example]) -> list[bool]:
        """Which captions give way to the empty prompt: one by one where its shape allows, else all or none."""
        draws = torch.rand(len(picked), generator=generator(seed, "caption dropout", step, micro))
        if _shapes(self.null) != _shapes(picked[0].conditioning):
            draws = draws[:1].expand(len(picked))
        return (draws < self.caption_dropout).tolist()

    def fingerprint(self) -> str:
        """A hash of all that decides the batches: a run continues only with the dataset it began with."""
        parts = [digest(float(self.caption_dropout).hex(), digest_named(self.null))]
        for example in self.examples:
            mask = "" if example.mask is None else example.mask
            row = digest_named(example.conditioning)
            parts.append(digest(example.latent, row, mask, example.caption, example.repeats))
        return digest(*parts)

    def describe(self) -> dict[str, object]:
        """For logs: pictures, sights in an epoch, and how many sights have which size (of the latent)."""
        sizes: dict[str, int] = {}
        for example in self.examples:
            height, width = example.latent.shape[1:]
            sizes[f"{width}x{height}"] = sizes.get(f"{width}x{height}", 0) + example.repeats
        return {"pictures": len(self.examples), "epoch": len(self), "latent_sizes": sizes}


def turns(sizes: Sequence[int]) -> list[int]:
    """A cycle of group numbers in which each group occurs in proportion to its size, spread evenly.

    Webster's method of apportionment: the next seat goes to the group with the most members for a half more than
    the seats it has. One cycle is the shortest that is exactly proportional.
    """
    queue = [(1 / size, 0, group) for group, size in enumerate(sizes)]
    heapq.heapify(queue)
    cycle = []
    for _ in range(sum(sizes) // math.gcd(*sizes)):
        _, seats, group = queue[0]
        cycle.append(group)
        heapq.heapreplace(queue, ((2 * seats + 3) / sizes[group], seats + 1, group))
    return cycle


def _group(examples: Sequence[Example]) -> list[list[int]]:
    """Numbers of the examples that can share a batch, each as often as it is repeated."""
    groups: dict[object, list[int]] = {}
    for number, example in enumerate(examples):
        key = (tuple(example.latent.shape), _shapes(example.conditioning))
        groups.setdefault(key, []).extend([number] * example.repeats)
    return list(groups.values())


def _shapes(conditioning: Mapping[str, Tensor]) -> tuple[object, ...]:
    """What has to be equal for rows to be joined."""
    return tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(conditioning.items()))


def _stack_masks(examples: Sequence[Example]) -> Tensor | None:
    """(b, 1, h, w); None where no example has one."""
    if all(example.mask is None for example in examples):
        return None
    whole = torch.ones_like(examples[0].latent[:1])
    return torch.stack([whole if example.mask is None else example.mask for example in examples])
