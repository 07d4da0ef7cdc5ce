import dataclasses
import logging
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stylewright.training.concepts.boxes import Box
from stylewright.training.concepts.crops import CropOptions, crops_of, items_of
from stylewright.training.concepts.phrases import Phrases
from stylewright.training.data.concepts import Concept
from stylewright.training.data.encoding import encode
from stylewright.training.data.items import Encoded, Item, items_from_memory, read_folder
from stylewright.training.denoiser import SIZES
from stylewright.training.hosts.host import Host

TOKEN = 16
WIDTH = 6


def average(images):
    """An autoencoder of one number a patch and colour."""
    return F.avg_pool2d(images, 8)


def hash_words(prompts):
    """A fixed random vector a word; one token a word, at least one."""
    rows = []
    for prompt in prompts:
        words = prompt.split() or ["<null>"]
        draws = [torch.Generator().manual_seed(sum(word.encode())) for word in words]
        rows.append(torch.stack([torch.randn(WIDTH, generator=g) for g in draws]))
    return {"context": torch.stack(rows), "pooled": torch.stack([row.sum(0) for row in rows])}


class Counted:
    """A function, and what it was called with."""

    def __init__(self, function):
        self.function = function
        self.calls = []

    def __call__(self, argument):
        self.calls.append(argument)
        return self.function(argument)


def toy_host(**changes):
    host = Host(
        name="toy",
        denoiser=None,
        encode_images=Counted(average),
        decode_latents=lambda latents: F.interpolate(latents, scale_factor=8.0),
        encode_prompts=Counted(hash_words),
        pixels_per_latent=8,
        pixels_per_token=TOKEN,
        resolution=64,
        device="cpu",
        training_conditioning={},
        sampling_conditioning={},
    )
    return dataclasses.replace(host, **changes)


def three_items():
    generator = torch.Generator().manual_seed(0)
    sizes = [(64, 64), (64, 64), (80, 128)]
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    return items_from_memory(images, ["a cat", "a dog", "a cat"])


def equal_examples(left, right):
    return all(
        torch.equal(a.latent, b.latent)
        and a.caption == b.caption
        and all(torch.equal(a.conditioning[name], b.conditioning[name]) for name in a.conditioning)
        for a, b in zip(left.examples, right.examples, strict=True)
    )


def test_what_comes_out_is_what_the_encoders_say():
    items = three_items()
    dataset = encode(items, toy_host(), resolution=64, style_phrase="ink wash", caption_dropout=0.1)
    assert [example.caption for example in dataset.examples] == [
        "a cat in ink wash style",
        "a dog in ink wash style",
        "a cat in ink wash style",
    ]
    first, _, wide = dataset.examples
    assert torch.equal(first.latent, average(items[0].image[None])[0])
    assert wide.latent.shape == (3, 6, 10)
    words = hash_words([first.caption])
    assert torch.equal(first.conditioning["context"], words["context"])
    assert torch.equal(dataset.null["pooled"], hash_words([""])["pooled"])


def test_pictures_and_captions_are_encoded_once_and_alone():
    host = toy_host()
    encode(three_items(), host, resolution=64, style_phrase="ink wash")
    assert host.encode_prompts.calls == [["a cat in ink wash style"], ["a dog in ink wash style"]]
    assert [tuple(pixels.shape) for pixels in host.encode_images.calls] == [(1, 3, 64, 64)] * 2 + [(1, 3, 48, 80)]


def test_the_cache_saves_the_work_and_changes_no_bit(tmp_path):
    plain = encode(three_items(), toy_host(), resolution=64, style_phrase="ink wash", caption_dropout=0.1)
    for round_ in range(2):
        host = toy_host()
        cached = encode(
            three_items(), host, resolution=64, style_phrase="ink wash", caption_dropout=0.1, cache_dir=tmp_path
        )
        assert equal_examples(plain, cached)
        assert plain.fingerprint() == cached.fingerprint()
        # Always the empty prompt and the probe picture, which tell the encoders apart.
        assert len(host.encode_prompts.calls) == (3, 1)[round_]
        assert len(host.encode_images.calls) == (4, 1)[round_]
    assert len(list(tmp_path.iterdir())) == 5


def test_the_cache_notices_changes(tmp_path):
    def work(host, items=None, resolution=64, style_phrase="ink wash"):
        encode(items or three_items(), host, resolution=resolution, style_phrase=style_phrase, cache_dir=tmp_path)
        return len(host.encode_images.calls) - 1, len(host.encode_prompts.calls) - 1

    assert work(toy_host()) == (3, 2)
    assert work(toy_host(), resolution=48) == (3, 0)
    assert work(toy_host(), style_phrase="oil painting") == (0, 2)
    assert work(toy_host(name="another")) == (3, 2)
    changed = three_items()
    changed[1].image[0, 5, 5] += 0.01
    assert work(toy_host(), changed) == (1, 0)
    # Encoders of other weights under the same name.
    assert work(toy_host(encode_images=Counted(lambda images: average(images) * 1.001))) == (3, 0)
    assert work(toy_host(encode_prompts=Counted(lambda p: {n: t + 1 for n, t in hash_words(p).items()}))) == (0, 2)
    assert work(toy_host()) == (0, 0)


def test_everything_made_in_inference_mode_can_be_trained_with(tmp_path):
    for cache_dir in (None, tmp_path, tmp_path):
        with torch.inference_mode():
            images = torch.rand(2, 3, 64, 64)
            items = items_from_memory(images, ["a cat", "a dog"], torch.rand(2, 64, 64))
            dataset = encode(
                items, toy_host(), resolution=64, style_phrase="ink", caption_dropout=0.1, cache_dir=cache_dir
            )
        batch = dataset.batch(0, 0, 0, 2)
        weight = torch.ones((), requires_grad=True)
        loss = (weight * batch.latents * batch.mask).sum() + (weight * batch.conditioning["context"]).sum()
        loss.backward()
        assert weight.grad.isfinite()
        assert not any(tensor.is_inference() for tensor in dataset.null.values())


def test_masks_follow_their_pictures():
    image = torch.rand(3, 64, 128)
    mask = torch.zeros(64, 128)
    mask[:, 64:] = 1
    (item,) = items_from_memory([image], "a cat", [mask])
    (example,) = encode([item], toy_host(), resolution=64, style_phrase="ink").examples
    height, width = example.latent.shape[1:]
    assert example.mask.shape == (1, height, width) and width > height
    assert example.mask[..., : width // 2 - 1].max() == 0
    assert example.mask[..., width // 2 + 1 :].min() > 0.999


def test_a_mask_that_is_cut_off_is_an_error():
    mask = torch.zeros(20, 400)
    mask[:, 0] = 1
    items = items_from_memory([torch.rand(3, 20, 400)], "a cat", [mask])
    with pytest.raises(ValueError, match="mask of picture 1 is black where"):
        encode(items, toy_host(), resolution=64, style_phrase="ink")


def test_progress_counts_every_piece():
    seen = []
    encode(
        three_items(),
        toy_host(),
        resolution=64,
        style_phrase="ink",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(count, 5) for count in range(1, 6)]


def test_enlarged_and_cut_pictures_are_reported(caplog):
    images = [torch.rand(3, 64, 64), torch.rand(3, 40, 40), torch.rand(3, 90, 900)]
    with caplog.at_level(logging.WARNING):
        encode(items_from_memory(images, "a cat"), toy_host(), resolution=64, style_phrase="ink")
    enlarged, cut = [record.getMessage() for record in caplog.records]
    assert "enlarged" in enlarged and "picture 2 (40x40 to 64x64)" in enlarged and "picture 1" not in enlarged
    assert "cut off" in cut and "picture 3 (900x90 to 128x32)" in cut and "picture 2" not in cut


def test_all_bad_pictures_are_named_before_anything_is_encoded(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a cat")
    items = read_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"broken")
    (tmp_path / "c.png").unlink()
    host = toy_host()
    with pytest.raises(ValueError) as error:
        encode(items, host, resolution=64, style_phrase="ink")
    assert "a.png" in str(error.value) and "c.png" in str(error.value) and "b.png" not in str(error.value)
    assert host.encode_images.calls == host.encode_prompts.calls == []


def test_bad_captions_are_named_before_anything_is_encoded():
    host = toy_host()
    with pytest.raises(ValueError, match=r"'ink' is missing from 3 of 3 captions: picture 1 \('a cat'\)"):
        encode(three_items(), host, resolution=64, style_phrase="ink", caption_mode="full")
    with pytest.raises(ValueError, match="need a style phrase"):
        encode(three_items(), host, resolution=64, style_phrase="")
    assert host.encode_images.calls == host.encode_prompts.calls == []


def test_nan_in_latents_names_the_picture_and_is_not_cached(tmp_path):
    def overflow(images):
        latents = average(images)
        return latents / 0 if images.shape[2] == 48 else latents

    host = toy_host(encode_images=overflow)
    with pytest.raises(ValueError, match="latents of picture 3 contain NaN or infinity"):
        encode(three_items(), host, resolution=64, style_phrase="ink", cache_dir=tmp_path)
    assert len(list(tmp_path.glob("latent-*"))) == 2
    assert not list(tmp_path.glob(".*"))


def test_nan_in_a_text_encoding_names_the_caption():
    host = toy_host(
        encode_prompts=lambda p: {"context": hash_words(p)["context"] * (float("nan") if "dog" in p[0] else 1)}
    )
    with pytest.raises(ValueError, match="'context' of 'a dog in ink style' contains NaN"):
        encode(three_items(), host, resolution=64, style_phrase="ink")


def test_what_a_host_refuses_is_told_with_the_caption():
    def refuse(prompts):
        if "dog" in prompts[0]:
            raise ValueError("unknown words: dog")
        return hash_words(prompts)

    with pytest.raises(ValueError, match="'a dog in ink style' cannot be encoded: unknown words: dog"):
        encode(three_items(), toy_host(encode_prompts=refuse), resolution=64, style_phrase="ink")


def test_a_host_whose_latents_have_another_size_is_refused():
    host = toy_host(encode_images=lambda images: F.avg_pool2d(images, 16))
    with pytest.raises(ValueError, match=r"toy made latents of the shape \(1, 3, 4, 4\) of picture 1.*channels, 8, 8"):
        encode(three_items(), host, resolution=64, style_phrase="ink")
    host = toy_host(encode_prompts=lambda prompts: {"context": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"'context' of the shape \(2, 3\), expected \(1, …\)"):
        encode(three_items(), host, resolution=64, style_phrase="ink")


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_dropout_is_a_share(dropout):
    with pytest.raises(ValueError, match="caption dropout"):
        encode(three_items(), toy_host(), resolution=64, style_phrase="ink", caption_dropout=dropout)


def test_no_items_and_no_room_are_errors():
    with pytest.raises(ValueError, match="no pictures"):
        encode([], toy_host(), resolution=64, style_phrase="ink")
    with pytest.raises(ValueError, match="resolution 8"):
        encode(three_items(), toy_host(), resolution=8, style_phrase="ink")


def with_concept(items, **said):
    return [dataclasses.replace(item, concept=Concept(**said)) for item in items]


def test_one_picture_at_several_sizes_is_several_examples_of_one_picture():
    items = with_concept(three_items(), resolutions=(64, 32))
    dataset = encode(items, toy_host(), resolution=48, style_phrase="ink")
    sizes = [tuple(example.latent.shape[1:]) for example in dataset.examples]
    assert sizes == [(8, 8), (4, 4), (8, 8), (4, 4), (6, 10), (4, 4)]
    assert dataset.pictures == 3
    # Every picture is seen equally often at each of its sizes.
    sights = Counter(
        (caption, tuple(batch.latents.shape[2:]))
        for step in range(len(dataset))
        for batch in [dataset.batch(0, step, 0, 1)]
        for caption in batch.captions
    )
    assert sights["a dog in ink style", (8, 8)] == sights["a dog in ink style", (4, 4)] == 1
    small = encode(items, toy_host(), resolution=48, style_phrase="ink").examples[1]
    assert torch.equal(
        small.latent, encode(three_items(), toy_host(), resolution=32, style_phrase="ink").examples[0].latent
    )


def test_concepts_have_their_own_words_sizes_and_modes():
    cat, dog, other = three_items()
    (cat,) = with_concept([cat], style_phrase="oil", resolutions=(32,))
    (other,) = with_concept([other], caption_mode="plain", role="base", weight=0.5)
    dataset = encode([cat, dog, other], toy_host(), resolution=64, style_phrase="ink", prior_share=0.25)
    told = [(example.caption, example.latent.shape[1], example.role, example.weight) for example in dataset.examples]
    assert told == [
        ("a cat in oil style", 4, "style", 1.0),
        ("a dog in ink style", 8, "style", 1.0),
        ("a cat", 6, "base", 0.5),
    ]
    assert [str(share) for share in dataset.shares.values()] == ["3/4", "1/4"]


def test_tags_are_seen_in_every_order_they_were_drawn_in():
    items = items_from_memory(torch.rand(1, 3, 64, 64), "cat, red, small, old", concept=Concept(orders=4, keep=1))
    first, again, other = (
        encode(items, toy_host(), resolution=64, style_phrase="ink", seed=seed) for seed in (0, 0, 1)
    )
    (example,) = first.examples
    texts = [example.caption, *(spelling.caption for spelling in example.others)]
    assert texts[0] == "cat, red, small, old in ink style" and len(set(texts)) == 4
    for text in texts:
        tags = text.removesuffix(" in ink style").split(", ")
        assert tags[0] == "cat" and sorted(tags) == ["cat", "old", "red", "small"]
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    seen = Counter(first.batch(0, step, 0, 1).captions[0] for step in range(400))
    assert seen.keys() == set(texts)
    assert all(abs(count - 100) < 40 for count in seen.values())  # standard deviation 9
    batch = first.batch(0, 7, 0, 1)
    row = hash_words(list(batch.captions))
    assert torch.equal(batch.conditioning["context"], row["context"])
    assert batch.captions == first.batch(0, 7, 0, 1).captions


def test_orders_whose_encoding_has_another_shape_are_left_out():
    def host(prompts):
        rows = hash_words(prompts)
        return rows if prompts[0].startswith("cat") else {**rows, "context": rows["context"].repeat(1, 2, 1)}

    items = items_from_memory(torch.rand(1, 3, 64, 64), "cat, red, old", concept=Concept(orders=6))
    (example,) = encode(items, toy_host(encode_prompts=host), resolution=64, style_phrase="ink").examples
    assert {other.caption for other in example.others} == {"cat, old, red in ink style"}


def test_a_run_without_caption_dropout_does_not_need_the_empty_prompt():
    def refuse(prompts):
        if prompts == [""]:
            raise ValueError("no text encoder")
        return hash_words(prompts)

    host = toy_host(encode_prompts=refuse)
    assert encode(three_items(), host, resolution=64, style_phrase="ink").null is None
    with pytest.raises(ValueError, match="no text encoder"):
        encode(three_items(), host, resolution=64, style_phrase="ink", caption_dropout=0.1)


def test_latents_that_came_encoded_are_taken_as_they_are():
    source = torch.Generator().manual_seed(3)
    latents = [torch.randn(3, 4, 6, generator=source), torch.randn(3, 8, 8, generator=source)]
    mask = torch.zeros(16, 24)
    mask[:, :12] = 1
    masks = [mask, None]
    items = [
        Item(Encoded(latent), "a cat", each, concept=Concept(resolutions=(32, 48)), name=f"latent {n}")
        for n, (latent, each) in enumerate(zip(latents, masks, strict=True))
    ]
    host = toy_host(latent_channels=3)
    dataset = encode(items, host, resolution=64, style_phrase="ink")
    assert all(torch.equal(example.latent, latent) for example, latent in zip(dataset.examples, latents, strict=True))
    assert host.encode_images.calls == []
    half = dataset.examples[0].mask
    assert half.shape == (1, 4, 6) and half[..., :3].min() == 1 and half[..., 3:].max() == 0


@pytest.mark.parametrize(
    ("latent", "mask", "message"),
    [
        (torch.rand(4, 4, 6), None, r"\(4, 4, 6\), and toy works on \(3, height, width\)"),
        (torch.full((3, 4, 6), torch.inf), None, "latent of it contains NaN"),
        (torch.rand(3, 4, 6), torch.zeros(8, 8), "mask of it is black all over"),
    ],
)
def test_latents_that_do_not_fit_are_named(latent, mask, message):
    item = Item(Encoded(latent), "a cat", mask, name="it")
    with pytest.raises(ValueError, match=message):
        encode([item], toy_host(latent_channels=3), resolution=64, style_phrase="ink")


def test_a_model_that_is_told_sizes_gets_those_of_each_picture():
    sizes = [(64, 64), (40, 40), (90, 64), (256, 256)]
    items = items_from_memory([torch.rand(3, *size) for size in sizes], "a cat")
    items.append(Item(Encoded(torch.rand(3, 4, 6)), "a cat"))
    host = toy_host(told_sizes=True, latent_channels=3)
    dataset = encode(items, host, resolution=64, style_phrase="ink", caption_dropout=0.5)
    assert [example.sizes[0].tolist() for example in dataset.examples] == [
        [64, 64, 0, 0, 64, 64],
        [40, 40, 0, 0, 64, 64],  # it was enlarged
        [90, 64, 0, 4, 80, 48],  # resized to 80x57, of which 4 are cut off at the left
        [256, 256, 0, 0, 64, 64],
        [32, 48, 0, 0, 32, 48],  # what a latent was made of is not known
    ]


def test_crops_are_told_as_pictures_of_their_own():
    """FineStyle's crops: what counts is their size before they are enlarged, and not where they were."""
    options, boxes = CropOptions(variants=3), {"a star": Box(10, 4, 26, 20)}
    crops = crops_of(boxes, 48, 64, options, seed=0)
    phrases = Phrases("a star in ink", ("a star",), ("ink",))
    items = items_of(torch.rand(3, 48, 64), phrases, crops, options)
    dataset = encode(items, toy_host(told_sizes=True), resolution=64, style_phrase="ink", caption_mode="full")
    assert [example.sizes[0].tolist() for example in dataset.examples] == [
        [48, 64, 6, 0, 48, 80],  # the whole: resized to 60x80
        *([crop.box.height, crop.box.width, 0, 0, 64, 64] for crop in crops),
    ]


def test_the_caption_is_dropped_and_the_sizes_stay():
    items = items_from_memory([torch.rand(3, 40, 40), torch.rand(3, 48, 48)], "a")
    told = encode(
        items, toy_host(told_sizes=True), resolution=64, style_phrase="", caption_mode="plain", caption_dropout=0.5
    )
    plain = encode(items, toy_host(), resolution=64, style_phrase="", caption_mode="plain", caption_dropout=0.5)
    dropped = 0
    for step in range(8):
        batch, other = told.batch(3, step, 0, 2), plain.batch(3, step, 0, 2)
        sizes = batch.conditioning.pop(SIZES)
        assert sorted(sizes[:, 0].tolist()) == [40, 48] and sizes.shape == (2, 6)
        dropped += batch.captions.count("")
        # Of a model that is told none every bit is as it was.
        assert batch.conditioning.keys() == other.conditioning.keys() and torch.equal(batch.latents, other.latents)
        assert all(torch.equal(batch.conditioning[name], other.conditioning[name]) for name in other.conditioning)
    assert 0 < dropped < 16
    assert told.fingerprint() != plain.fingerprint()
