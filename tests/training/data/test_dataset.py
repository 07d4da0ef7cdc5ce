import dataclasses
from collections import Counter

import pytest
import torch

from stylewright.training.data.concepts import Concept
from stylewright.training.data.dataset import Dataset, Example, Spelling


def example(number, height=4, width=6, tokens=3, repeats=1, mask=False):
    return Example(
        name=str(number),
        latent=torch.full((2, height, width), float(number)),
        conditioning={
            "context": torch.full((1, tokens, 5), float(number)),
            "pooled": torch.full((1, 5), float(number)),
        },
        mask=torch.full((1, height, width), 0.5) if mask else None,
        caption=f"caption {number}",
        repeats=repeats,
    )


def null(tokens=3):
    return {"context": torch.full((1, tokens, 5), -1.0), "pooled": torch.full((1, 5), -1.0)}


def made(*examples, dropout=0.0, tokens=3):
    return Dataset(examples, null(tokens), dropout)


def numbers(batch):
    return batch.latents[:, 0, 0, 0].int().tolist()


def run(dataset, steps, batch_size, accumulation=1, seed=0):
    """Which examples each forward pass of a run sees."""
    return [
        numbers(dataset.batch(seed, step, micro, batch_size, accumulation))
        for step in range(steps)
        for micro in range(accumulation)
    ]


def spread(batches, among):
    counts = Counter(number for batch in batches for number in batch)
    return max(counts[number] for number in among) - min(counts[number] for number in among)


def test_rows_belong_together():
    dataset = made(*map(example, range(7)))
    for step in range(10):
        batch = dataset.batch(0, step, 0, 3)
        assert batch.latents.shape == (3, 2, 4, 6)
        assert batch.conditioning["context"].shape == (3, 3, 5)
        assert batch.conditioning["pooled"][:, 0].int().tolist() == numbers(batch)
        assert batch.conditioning["context"][:, 1, 2].int().tolist() == numbers(batch)
        assert batch.captions == tuple(f"caption {number}" for number in numbers(batch))
        assert batch.mask is None


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_at_any_moment_no_example_is_ahead_by_more_than_one(batch_size, accumulation):
    dataset = made(*map(example, range(7)))
    batches = run(dataset, 20, batch_size, accumulation)
    for length in range(1, len(batches) + 1):
        assert spread(batches[:length], range(7)) <= 1
    assert {len(batch) for batch in batches} == {batch_size}


def test_epochs_are_shuffled_differently_and_by_the_seed():
    dataset = made(*map(example, range(7)))
    batches = run(dataset, 6, 7)
    assert all(sorted(batch) == list(range(7)) for batch in batches)
    assert len(set(map(tuple, batches))) == 6
    assert batches != run(dataset, 6, 7, seed=1)


def test_a_batch_depends_on_its_place_only():
    dataset = made(*map(example, range(5)), example(5, height=8), dropout=0.3)
    straight = run(dataset, 12, 2, accumulation=2)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert numbers(dataset.batch(0, 7, 1, 2, 2)) == straight[15]
    assert dataset.batch(0, 7, 1, 2, 2).captions == dataset.batch(0, 7, 1, 2, 2).captions
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_has_one_size_and_all_sizes_get_their_share():
    shapes = {0: (4, 6), 1: (4, 6), 2: (4, 6), 3: (6, 4), 4: (6, 4), 5: (8, 3)}
    dataset = made(*(example(number, *shape) for number, shape in shapes.items()))
    batches = run(dataset, 12, 2)
    for batch in batches:
        assert len({shapes[number] for number in batch}) == 1
    # A cycle is 6 batches of 2: each of 6 examples is seen twice.
    for start in (0, 6):
        assert set(Counter(n for batch in batches[start : start + 6] for n in batch).values()) == {2}
    for length in range(1, 13):
        assert spread(batches[:length], range(6)) <= 2


@pytest.mark.parametrize(("sizes", "batch_size"), [((9, 1), 1), ((9, 1), 4), ((5, 5, 5), 2), ((20, 7, 3, 1), 4)])
def test_a_small_group_is_not_seen_more_often(sizes, batch_size):
    groups = {n: size for size, count in enumerate(sizes) for n in range(sum(sizes[:size]), sum(sizes[:size]) + count)}
    dataset = made(*(example(number, height=4 + group) for number, group in groups.items()))
    batches = run(dataset, 3 * sum(sizes), batch_size)
    assert spread(batches, groups) <= 1
    # Whatever the moment, nobody is ahead by more than what two batches of the smallest group amount to.
    for length in range(1, len(batches) + 1, 3):
        assert spread(batches[:length], groups) <= 1 + 2 * -(-batch_size // min(sizes))


def test_prompts_of_different_lengths_do_not_share_a_batch():
    dataset = made(*(example(number, tokens=3 + number % 2) for number in range(6)))
    for batch in run(dataset, 12, 2):
        assert len({number % 2 for number in batch}) == 1


def test_repeats():
    dataset = made(example(0, repeats=3), example(1), example(2, repeats=2))
    assert len(dataset) == 6
    counts = Counter(n for batch in run(dataset, 10, 3) for n in batch)
    assert counts == {0: 15, 1: 5, 2: 10}


@pytest.mark.parametrize("tokens", [3, 7])
def test_captions_are_dropped_at_their_rate(tokens):
    """Also where the empty prompt has another length, so that whole batches have to be dropped."""
    dataset = made(*map(example, range(4)), dropout=0.25, tokens=tokens)
    dropped = []
    for step in range(400):
        batch = dataset.batch(0, step, 0, 4)
        flags = [caption == "" for caption in batch.captions]
        assert (batch.conditioning["pooled"][:, 0] == -1).tolist() == flags
        assert (batch.conditioning["context"][:, 0, 0] == -1).tolist() == flags
        assert batch.conditioning["context"].shape[1] == (tokens if all(flags) else 3)
        dropped.append(flags)
    rates = torch.tensor(dropped).float().mean(0)
    # Standard error of a rate over 400 steps: 0.022.
    assert ((rates - 0.25).abs() < 0.08).all()
    mixed = sum(0 < sum(flags) < 4 for flags in dropped)
    assert (mixed > 100) == (tokens == 3) and (mixed == 0) == (tokens == 7)


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, False), (1.0, True)])
def test_limits_of_dropout(dropout, expected):
    dataset = made(*map(example, range(3)), dropout=dropout)
    assert all((caption == "") == expected for step in range(50) for caption in dataset.batch(0, step, 0, 3).captions)


def test_each_pass_draws_its_own_dropout():
    dataset = made(example(0), dropout=0.5)
    passes = [(seed, step, micro) for seed in range(2) for step in range(30) for micro in range(2)]
    dropped = {place: dataset.batch(*place, 4, 2).captions for place in passes}
    for changed in range(3):
        pairs = [(p, q) for p in passes for q in passes if [i for i in range(3) if p[i] != q[i]] == [changed]]
        # Two independent passes agree in all four draws in 1 of 16 cases.
        assert sum(dropped[p] == dropped[q] for p, q in pairs) < 0.2 * len(pairs)


def test_dropout_does_not_change_the_order():
    without, with_ = (made(*map(example, range(5)), dropout=dropout) for dropout in (0.0, 0.5))
    assert run(without, 10, 2) == run(with_, 10, 2)


def test_pictures_without_a_mask_count_whole_beside_those_with_one():
    dataset = made(example(0, mask=True), example(1))
    batch = dataset.batch(0, 0, 0, 2)
    assert batch.mask.shape == (2, 1, 4, 6)
    for number, mask in zip(numbers(batch), batch.mask, strict=True):
        assert (mask == (0.5 if number == 0 else 1)).all()


def test_a_batch_is_a_copy():
    dataset = made(example(3))
    dataset.batch(0, 0, 0, 1).latents.zero_()
    dataset.batch(0, 0, 0, 1).conditioning["pooled"].zero_()
    batch = dataset.batch(0, 0, 0, 1)
    assert numbers(batch) == [3] and batch.conditioning["pooled"][0, 0] == 3


def test_the_fingerprint_tells_datasets_apart():
    first = example(0)
    others = [
        dataclasses.replace(first, latent=first.latent + 1),
        dataclasses.replace(first, conditioning={**first.conditioning, "pooled": torch.ones(1, 5)}),
        dataclasses.replace(first, caption="another"),
        dataclasses.replace(first, repeats=2),
        dataclasses.replace(first, mask=torch.ones(1, 4, 6)),
        dataclasses.replace(first, weight=2.0),
        dataclasses.replace(first, others=(Spelling("another order", first.conditioning),)),
    ]
    prints = {made(changed).fingerprint() for changed in [first, *others]}
    prints |= {made(first, dropout=0.1).fingerprint(), made(first, tokens=4).fingerprint()}
    assert len(prints) == 10
    assert made(first).fingerprint() == made(dataclasses.replace(first, name="moved elsewhere")).fingerprint()


def test_the_description_is_for_logs():
    dataset = made(example(0, repeats=2), example(1), example(2, height=8))
    assert dataset.describe() == {"pictures": 3, "epoch": 4, "latent_sizes": {"6x4": 3, "6x8": 1}}


def test_wrong_arguments_are_named():
    dataset = made(example(0))
    with pytest.raises(ValueError, match="no examples"):
        Dataset([], null())
    with pytest.raises(ValueError, match=r"caption dropout is 2"):
        made(example(0), dropout=2)
    with pytest.raises(ValueError, match="batch size 0"):
        dataset.batch(0, 0, 0, 0)
    with pytest.raises(ValueError, match="accumulation 0"):
        dataset.batch(0, 0, 0, 1, 0)
    with pytest.raises(ValueError, match="pass 1 of step 3: expected a pass from 0 to 0"):
        dataset.batch(0, 3, 1, 1)
    with pytest.raises(ValueError, match="step -1"):
        dataset.batch(0, -1, 0, 1)


def prior(number, role="pictures", **changes):
    return dataclasses.replace(example(number), role=role, **changes)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1, 0.35])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_prior_preservation_has_exactly_its_share(share, batch_size):
    dataset = Dataset([example(0), example(1), *(prior(n, weight=0.5) for n in range(10, 17))], null(), 0.0, share)
    kinds = [dataset.batch(0, step, 0, batch_size) for step in range(100)]
    preserving = [batch for batch in kinds if numbers(batch)[0] >= 10]
    assert len(preserving) == 100 * share
    for batch in kinds:
        assert len({number >= 10 for number in numbers(batch)}) == 1 and not batch.of_base
    # Over a cycle the weights of the style's samples sum to its number of samples, and the others' to half of that.
    samples = 100 * batch_size
    assert sum(batch.weights.sum().item() for batch in kinds) == pytest.approx(1.5 * samples)
    assert sum(batch.weights.sum().item() for batch in preserving) == pytest.approx(0.5 * samples)
    # Each pool is as even in itself as without the other.
    assert spread([numbers(batch) for batch in preserving], range(10, 17)) <= 1


def test_the_style_s_pictures_come_in_the_same_order_with_and_without_others():
    style = [example(n) for n in range(5)]
    alone = run(Dataset(style, null()), 10, 2)
    beside = run(Dataset([*style, prior(9)], null()), 20, 2)
    assert [batch for batch in beside if batch[0] != 9] == alone


def test_targets_of_two_kinds_do_not_share_a_batch():
    dataset = Dataset([example(0), prior(10), prior(11, "base"), prior(12, "base")], null())
    for step in range(40):
        batch = dataset.batch(0, step, 0, 2)
        assert {number >= 11 for number in numbers(batch)} == {batch.of_base}


def test_without_prior_preservation_weights_are_exactly_one():
    weights = torch.cat([made(example(0), example(1)).batch(0, step, 0, 3).weights for step in range(5)])
    assert (weights == 1).all()


def test_wrong_priors_are_named():
    with pytest.raises(ValueError, match="at least one of the style"):
        Dataset([prior(0)], null())
    with pytest.raises(ValueError, match="share of samples for prior preservation is 1"):
        Dataset([example(0), prior(1)], null(), 0.0, 1.0)
    with pytest.raises(ValueError, match="no text encoder"):
        Dataset([example(0)], None, 0.1)
    with pytest.raises(ValueError, match="role"):
        Concept(role="priors")
    with pytest.raises(ValueError, match="weight of pictures is 0"):
        Concept(weight=0)
