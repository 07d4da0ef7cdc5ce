"""Encoded examples, and the batches of any step as a pure function of where the step is.

Examples of one shape (of latent and of conditioning) form a group, and a batch comes from one group. A longer
prompt is not padded to the length of another one: models without an attention mask would read the padding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..denoiser import SIZES, Conditioning
from ..processes import Processes
from ..randomness import generator
from .cache import digest, digest_named
from .concepts import BASE, PRIOR_SHARE, STYLE, check_prior_share
from .order import Order

WHOLE = slice(None)


@dataclass(frozen=True)
class Spelling:
    """A caption, encoded."""

    caption: str
    conditioning: Conditioning  # rows (1, …)


@dataclass(frozen=True)
class Example:
    """One picture at one size, encoded. float32 on the CPU."""

    name: str
    latent: Tensor  # (c, h, w)
    conditioning: Conditioning  # rows (1, …)
    mask: Tensor | None  # (1, h, w) in [0, 1]; None = the whole picture
    caption: str
    repeats: int = 1
    weight: float = 1.0  # factor on its loss
    role: str = STYLE  # or one of PRIORS
    others: tuple[Spelling, ...] = ()  # the caption's tags in further orders, of the same shapes
    sizes: Tensor | None = None  # (1, 6) the conditioning SIZES, whatever the caption; None = the model is told none


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees."""

    latents: Tensor  # (b, c, h, w)
    conditioning: Conditioning  # (b, …)
    mask: Tensor | None  # (b, 1, h, w)
    captions: tuple[str, ...]  # "" where the caption was dropped
    weights: Tensor  # (b,) factors on the losses
    of_base: bool  # whether the target is what the model says without its adapter


class Dataset:
    """Examples with repeats, in an endless order that depends on the seed alone.

    Each group is a stream of shuffled epochs, cut into batches that run on from one epoch into the next, so that
    none is smaller. Groups take turns so that all examples are seen at the same rate: after n draws from a group
    any two of its examples differ by at most one sight (times their repeats), and after a whole cycle of turns all
    examples of the dataset are even.

    With pictures for prior preservation, batches of them take turns with those of the style so that ``prior_share``
    of all batches is theirs, and weights undo the shares: over a cycle the mean loss is the mean of the style's plus
    the mean of theirs, each times its own weight. The share moves work and variance, never the objective.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        null: Conditioning | None,
        caption_dropout: float = 0.0,
        prior_share: float = PRIOR_SHARE,
    ) -> None:
        """``null`` is the conditioning of the empty prompt, (1, …); None = there is none, and no caption dropout."""
        _check(examples, null, caption_dropout, prior_share)
        self.examples = tuple(examples)
        self.null = null
        self.caption_dropout, self.prior_share = caption_dropout, prior_share
        self.shares = _shares(self.examples, prior_share)
        seats = [int(share * self.shares[False].denominator) for share in self.shares.values()]
        self._order = Order([_group(self.examples, prior) for prior in self.shares], seats)

    def __len__(self) -> int:
        """Sights in an epoch: every example as often as it is repeated."""
        return sum(example.repeats for example in self.examples)

    @property
    def pictures(self) -> int:
        """How many pictures there are of the style, however many sizes each is trained at."""
        return len({example.name for example in self.examples if example.role == STYLE})

    def batch(
        self, seed: int, step: int, micro: int, batch_size: int, accumulation: int = 1, rows: slice = WHOLE
    ) -> Batch:
        """The batch of one forward pass: ``micro`` of the ``accumulation`` passes of an optimizer step.

        ``rows``: those of it that are wanted, as they are in the whole.
        """
        if batch_size < 1 or accumulation < 1:
            raise ValueError(f"Got batch size {batch_size} and accumulation {accumulation}: both are at least 1")
        if not (step >= 0 and 0 <= micro < accumulation):
            raise ValueError(f"Got pass {micro} of step {step}: expected a pass from 0 to {accumulation - 1}")
        numbers = self._order.batch(seed, step * accumulation + micro, batch_size)
        picked = [self.examples[number] for number in numbers]
        spelt = self._spelt(seed, step, micro, picked)[rows]
        picked = picked[rows]
        return Batch(
            latents=torch.stack([example.latent for example in picked]),
            conditioning=_joined([_row(*each) for each in zip(picked, spelt, strict=True)]),
            mask=_stack_masks(picked),
            captions=tuple(spelling.caption for spelling in spelt),
            weights=torch.tensor([example.weight / float(self.shares[example.role != STYLE]) for example in picked]),
            of_base=picked[0].role == BASE,
        )

    def _spelt(self, seed: int, step: int, micro: int, picked: list[Example]) -> list[Spelling]:
        """The caption of each sample: in one of its orders, or the empty prompt."""
        source = generator(seed, "caption order", step, micro)
        orders = torch.rand(len(picked), generator=source, dtype=torch.float64).tolist()
        spelt = []
        for example, order, drop in zip(picked, orders, self._dropped(seed, step, micro, picked), strict=True):
            all_orders = (Spelling(example.caption, example.conditioning), *example.others)
            spelt.append(_empty(self.null) if drop else all_orders[int(order * len(all_orders))])
        return spelt

    def _dropped(self, seed: int, step: int, micro: int, picked: list[Example]) -> list[bool]:
        """Which captions give way to the empty prompt: one by one where its shape allows, else all or none."""
        if self.null is None:
            return [False] * len(picked)
        draws = torch.rand(len(picked), generator=generator(seed, "caption dropout", step, micro))
        if shapes(self.null) != shapes(picked[0].conditioning):
            draws = draws[:1].expand(len(picked))
        return (draws < self.caption_dropout).tolist()

    def fingerprint(self) -> str:
        """A hash of all that decides the batches: a run continues only with the dataset it began with."""
        shares = [str(share) for share in self.shares.values()]
        parts = [digest(float(self.caption_dropout).hex(), digest_named(self.null or {}), *shares)]
        for example in self.examples:
            mask = "" if example.mask is None else example.mask
            row = digest_named(example.conditioning)
            use = digest(example.repeats, float(example.weight).hex(), example.role)
            others = [digest(other.caption, digest_named(other.conditioning)) for other in example.others]
            sizes = () if example.sizes is None else (example.sizes,)
            parts.append(digest(example.latent, row, mask, example.caption, use, *sizes, *others))
        return digest(*parts)

    def describe(self) -> dict[str, object]:
        """For logs: pictures, sights in an epoch, and how many sights have which size (of the latent)."""
        sizes: dict[str, int] = {}
        for example in self.examples:
            height, width = example.latent.shape[1:]
            sizes[f"{width}x{height}"] = sizes.get(f"{width}x{height}", 0) + example.repeats
        return {"pictures": self.pictures, "epoch": len(self), "latent_sizes": sizes}


def shared_dataset(make: Callable[[], Dataset], processes: Processes) -> Dataset:
    """What ``make`` gives in the first process, in all of them. They raise what it raises."""
    made: list[Dataset] = []
    with processes.together():
        if processes.writes:
            made.append(make())
    settings = processes.shared([(d.null, d.caption_dropout, d.prior_share, len(d.examples)) for d in made])
    null, caption_dropout, prior_share, count = settings[0]
    # One by one: in main memory the pictures are there once, and not also all of them on their way.
    examples = [processes.shared([d.examples[place] for d in made])[0] for place in range(count)]
    return made[0] if made else Dataset(examples, null, caption_dropout, prior_share)


def _check(examples: Sequence[Example], null: Conditioning | None, caption_dropout: float, prior_share: float) -> None:
    if not examples:
        raise ValueError("There are no examples to train on: give at least one")
    if all(example.role != STYLE for example in examples):
        raise ValueError("All pictures are for prior preservation: give at least one of the style")
    if not 0 <= caption_dropout <= 1:
        raise ValueError(f"The caption dropout is {caption_dropout}, expected a share from 0 to 1")
    if caption_dropout and null is None:
        raise ValueError("Caption dropout needs the empty prompt's encoding, and there is no text encoder to make it")
    check_prior_share(prior_share)


def _shares(examples: Sequence[Example], prior_share: float) -> dict[bool, Fraction]:
    """The share of batches that are for the style (False) and for prior preservation (True)."""
    if all(example.role == STYLE for example in examples):
        return {False: Fraction(1)}
    prior = Fraction(prior_share).limit_denominator(100)
    return {False: 1 - prior, True: prior}


def _empty(null: Conditioning | None) -> Spelling:
    assert null is not None  # nothing is dropped without it
    return Spelling("", null)


def _group(examples: Sequence[Example], prior: bool) -> list[list[int]]:
    """Numbers of the style's examples, or of the others, that can share a batch, each as often as it is repeated."""
    groups: dict[object, list[int]] = {}
    for number, example in enumerate(examples):
        if (example.role != STYLE) == prior:
            key = (tuple(example.latent.shape), shapes(example.conditioning), example.sizes is None, example.role)
            groups.setdefault(key, []).extend([number] * example.repeats)
    return list(groups.values())


def shapes(conditioning: Mapping[str, Tensor]) -> tuple[object, ...]:
    """What has to be equal for rows to be joined."""
    return tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(conditioning.items()))


def _row(example: Example, spelling: Spelling) -> Conditioning:
    """What the model is told of an example, (1, …)."""
    return spelling.conditioning if example.sizes is None else {**spelling.conditioning, SIZES: example.sizes}


def _joined(rows: Sequence[Conditioning]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _stack_masks(examples: Sequence[Example]) -> Tensor | None:
    """(b, 1, h, w); None where no example has one."""
    if all(example.mask is None for example in examples):
        return None
    whole = torch.ones_like(examples[0].latent[:1])
    return torch.stack([whole if example.mask is None else example.mask for example in examples])
