"""Concept Crops: places by a model's own attention or by masks, and what goes to the trainer."""

import pytest
import torch
from tiny_models import TinyClip, TinyVae, is_known, tiny_model

from stylewright.training.embedded.several import several
from stylewright.training.embedded.vocabulary import named_styles

pytestmark = pytest.mark.comfy

STYLE = named_styles()["riviera"]
PROMPT = f"star and house in {' '.join(STYLE.words)} style"
PHRASES = {"prompt": PROMPT, "content_phrases": "star\nhouse", "style_phrases": " ".join(STYLE.words)}
SCENE = several([3, 9], STYLE, torch.Generator().manual_seed(0))
IMAGE = SCENE.picture.movedim(0, -1)[None]


def run(**inputs):
    from stylewright.nodes.concept_crops import ConceptCrops

    with torch.inference_mode():
        return ConceptCrops.execute(**{"image": IMAGE, **PHRASES, "resolution": 128, **inputs}).args


@pytest.fixture(scope="module")
def embedded():
    from stylewright.nodes.bridge.embedded import load_embedded

    with torch.inference_mode():
        return load_embedded()


def truth(number):
    mask = torch.zeros(128, 128)
    left, top, right, bottom = SCENE.boxes[number].tolist()
    mask[top:bottom, left:right] = 1
    return mask


def test_masks_alone_need_no_model():
    dataset, preview, crops, prompts = run(masks=torch.stack([truth(0), truth(1)]), padding=0.0, least_side=0.0)
    assert preview.ndim == 4 and preview.shape[-1] == 3
    assert len(dataset.items) == 1 + 2 * 4 and dataset.caption_mode == "full"
    assert torch.equal(dataset.items[0].image, SCENE.picture)
    for number, crop in enumerate(crops):
        left, top, right, bottom = SCENE.boxes[number].tolist()
        side = max(right - left, bottom - top)
        assert crop.shape == (1, side, side, 3)
    assert prompts.splitlines()[0] == f"40 %  {PROMPT}"
    assert [line.partition("%  ")[2] for line in prompts.splitlines()[1:]] == [
        f"{what} in {PHRASES['style_phrases']} style" for what in ("star", "house")
    ]


def test_a_note_of_tiny_crops_goes_to_the_trainer(caplog):
    masks = torch.stack([truth(0), truth(1)])
    assert not run(masks=masks)[0].notes
    (note,) = run(masks=masks, resolution=1024)[0].notes
    assert "enlarged more than 4 times for training at 1024" in note and note in caplog.text


def test_a_mask_counts_instead_of_the_model(embedded):
    inputs = {"model": embedded.model, "clip": embedded.clip, "vae": embedded.vae, "noises": 1, "variants": 1}
    _, _, found, _ = run(**inputs)
    _, _, crops, _ = run(**inputs, masks=truth(1)[None], masked_phrases="house")
    left, top, right, bottom = SCENE.boxes[1].tolist()
    wanted = round(max(right - left, bottom - top) * 1.3)
    assert torch.equal(crops[0], found[0]) and abs(crops[1].shape[1] - wanted) <= 1


def test_both_hosts_see_the_same(embedded):
    from stylewright.nodes.bridge.attention_maps import phrase_maps
    from stylewright.training.concepts.locate import Search, attention_maps
    from stylewright.training.hosts.attention_maps import watch_of
    from stylewright.training.hosts.embedded import load_embedded

    search, phrases = Search(noises=1), ["star", "house", PHRASES["style_phrases"]]
    with torch.inference_mode():
        ours = phrase_maps(embedded.model, embedded.clip, embedded.vae, SCENE.picture, PROMPT, phrases, search, 128)
    host = load_embedded()
    theirs = attention_maps(host, watch_of(host), SCENE.picture, PROMPT, phrases, search)
    assert ours.shape == (3, 16, 16) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


def test_both_hosts_err_the_same(embedded):
    from stylewright.nodes.bridge.attention_maps import phrase_maps
    from stylewright.training.concepts.errors import error_maps
    from stylewright.training.concepts.locate import Search
    from stylewright.training.hosts.embedded import load_embedded

    asked = SCENE.picture, PROMPT, ["star", "house"], Search(noises=1)
    with torch.inference_mode():
        ours = phrase_maps(embedded.model, embedded.clip, embedded.vae, *asked, 128, "prediction error")
    theirs = error_maps(load_embedded(), *asked)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


def test_the_model_is_left_as_it_was(embedded):
    before = embedded.model.model_options["transformer_options"].copy()
    for by in ("attention", "prediction error"):
        run(model=embedded.model, clip=embedded.clip, vae=embedded.vae, noises=1, locate_by=by)
    assert embedded.model.model_options["transformer_options"] == before
    assert not embedded.model.object_patches and not embedded.model.wrappers.get("apply_model")


def test_the_same_seed_finds_and_cuts_the_same(embedded):
    inputs = {"model": embedded.model, "clip": embedded.clip, "vae": embedded.vae, "noises": 1}
    one, other, third = run(**inputs)[0], run(**inputs)[0], run(**inputs, seed=1)[0]
    assert all(torch.equal(a.image, b.image) for a, b in zip(one.items, other.items, strict=True))
    assert any(a.image.shape != b.image.shape or not torch.equal(a.image, b.image)
               for a, b in zip(one.items, third.items, strict=True))  # fmt: skip


LENGTHS = {"sd3": {"l": 20, "g": 20, "t5xxl": 30}, "flux": {"l": 20, "t5xxl": 30}}  # of texts


class Words(TinyClip):
    """A token a word, between a beginning and an end, as many as there are in its context; of SD3 two texts."""

    def tokenize(self, text):
        ids = [1, *(2 + sum(word.encode()) for word in text.split()), 0]
        lengths = LENGTHS.get(self.family, {"l": 20})
        return {name: [[(token, 1.0) for token in ids + [0] * (n - len(ids))]] for name, n in lengths.items()}

    def encode_from_tokens_scheduled(self, tokens, show_pbar=True):
        from tiny_models import tiny_conditioning

        lengths = LENGTHS.get(self.family, {"l": 20})
        count = {"sd3": 50, "flux": 30}.get(self.family, lengths["l"])
        return tiny_conditioning(self.family, count, 1)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "chroma", "sd3", "qwen"])
def test_families_are_seen_into(family):
    from stylewright.nodes.bridge.families import is_film

    with torch.inference_mode():
        model = tiny_model(family)
    inputs = {"model": model, "clip": Words(family), "vae": TinyVae(family, is_film(model)), "noises": 1}
    picture = torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(0))
    phrases = {
        "prompt": "a cat beside two dogs in ink style",
        "content_phrases": "a cat\ntwo dogs",
        "style_phrases": "ink",
    }
    dataset, _, crops, _ = run(image=picture, **phrases, **inputs)
    assert len(crops) == 2 and len(dataset.items) == 9


def test_a_planted_attention_is_where_the_box_is():
    """A UNet whose queries at some place look at one word: its box is there, whatever the word's number."""
    from comfy.ldm.modules import attention

    from stylewright.nodes.bridge.attention_maps import seen
    from stylewright.training.concepts.maps import Layout, Recorder

    recorder, q, k = Recorder(Layout(6, 16, 16), [[4]]), torch.zeros(1, 64, 16), torch.zeros(1, 6, 16)
    k[:, 4, :8], q[:, 9, :8] = 5.0, 5.0  # one head of two, at row 1 and column 1 of 8
    before = attention.optimized_attention
    recorder.begin()
    with seen(recorder):
        answer = attention.optimized_attention(q, k, k, 2, transformer_options={})
    assert attention.optimized_attention is before and torch.equal(answer, before(q, k, k, 2))
    values = recorder.maps()[0]
    assert values.argmax() in (2 * 16 + 2, 2 * 16 + 3, 3 * 16 + 2, 3 * 16 + 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"content_phrases": "star\nboat"}, r"no part of the prompt: 'boat'"),
        ({"content_phrases": ""}, "no content phrases"),
        ({"style_phrases": ""}, "no style phrase"),
        ({}, "nothing tells where 'star', 'house' is"),
        ({"masks": torch.stack([truth(0), torch.zeros(128, 128)])}, "The mask of 'house' is black all over"),
        ({"masks": torch.ones(2, 64, 100)}, "mask of 'star' is 100x64, the picture 128x128"),
        ({"masks": truth(0)[None]}, r"1 masks for 2 phrases \(star, house\)"),
        ({"masks": truth(0)[None], "masked_phrases": "tree"}, "masks of what is no content phrase: 'tree'"),
        (
            {"masks": torch.stack([truth(0)] * 3), "masked_phrases": "star\nstar\nhouse"},
            "masked_phrases names 'star' twice",
        ),
        ({"masked_phrases": "star"}, "masked_phrases names star, and no masks are linked"),
        ({"masks": truth(0)[None], "masked_phrases": "star"}, "nothing tells where 'house' is"),
        ({"model": object()}, "needs its text encoder and VAE: link clip and vae"),
        ({"image": torch.rand(2, 16, 16, 3)}, "there are 2 pictures"),
    ],
)
def test_mistakes_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        run(**inputs)


def test_a_phrase_without_tokens_is_named(embedded):
    phrases = {"prompt": "star with the house in ocean style", "content_phrases": "with the", "style_phrases": "ocean"}
    with pytest.raises(ValueError, match="no token for the phrase 'with the'"):
        run(**phrases, model=embedded.model, clip=embedded.clip, vae=embedded.vae)


def test_a_model_that_cannot_be_seen_into_is_named_and_errs():
    if not is_known("pixeldit"):
        pytest.skip("this ComfyUI does not have it")
    with torch.inference_mode():
        model = tiny_model("pixeldit")
    with pytest.raises(ValueError, match=r"PixDiT_T2I: where .* has the text is not known.*locate by prediction error"):
        run(model=model, clip=Words("pixeldit"), vae=TinyVae("pixeldit", False))
    found = run(model=model, clip=TinyClip("pixeldit"), vae=TinyVae("pixeldit", False), locate_by="prediction error")
    assert len(found[2]) == 2
