"""Combine Style Datasets: what comes of several datasets, and of regularisation."""

import pytest
import torch

pytestmark = pytest.mark.comfy

NODE = {"repeats_1": 1, "repeats_2": 1, "repeats_3": 1, "repeats_4": 1, "prior_weight": 1.0, "prior_share": 0.5}


def combined(*datasets, **changes):
    from stylewright.nodes.combine import CombineDatasetsNode

    given = {f"dataset_{n}": each for n, each in enumerate(datasets, start=1)}
    return CombineDatasetsNode.execute(**{**NODE, "prior_target": "pictures", **given, **changes}).args


def dataset(style="ink", count=1, mode="content", **changes):
    from stylewright.nodes.dataset import StyleDatasetNode

    plain = {"captions": ["a cat"], "style_phrase": [style], "resolution": [64], "caption_mode": [mode]}
    images = [torch.rand(count, 64, 64, 3)]
    folder = ["[from the images input]"]
    return StyleDatasetNode.execute(images=images, folder=folder, **{**plain, **changes}).args[0]


def test_concepts_keep_what_they_say_and_are_repeated():
    ink, oil = dataset("ink", 2, repeats=[2]), dataset("oil", resolution=[128])
    made, text = combined(ink, oil, repeats_1=3)
    assert [item.repeats for item in made.items] == [6, 6, 1]
    assert [item.concept.style_phrase for item in made.items] == ["ink", "ink", "oil"]
    assert [item.concept.resolutions for item in made.items] == [(64,), (64,), (128,)]
    assert (made.style_phrase, made.resolution) == ("ink", 64)
    assert len({item.name for item in made.items}) == 3
    assert (
        text
        == "2 pictures in the style 'ink', 12 sights in a round\n1 pictures in the style 'oil', 1 sights in a round"
    )


def test_regularisation_is_for_preservation():
    others = dataset("none", 3, "plain")
    made, text = combined(dataset(), regularisation=others, prior_weight=0.5, prior_share=0.25)
    assert [(item.concept.role, item.concept.weight) for item in made.items] == [("style", 1), *[("pictures", 0.5)] * 3]
    assert made.prior_share == 0.25 and text.endswith("25% of the samples preserve")
    made, _ = combined(dataset(), regularisation=others, prior_target="base model")
    assert {item.concept.role for item in made.items[1:]} == {"base"}


def test_the_base_model_is_preserved_on_the_style_s_own_pictures():
    ink = dataset("ink", 2)
    made, _ = combined(ink, prior_target="base model")
    style, prior = made.items[:2], made.items[2:]
    assert [item.concept.role for item in prior] == ["base"] * 2
    assert [item.concept.caption_mode for item in prior] == ["plain"] * 2
    assert all(own.image is again.image for own, again in zip(style, prior, strict=True))
    assert {item.concept.role for item in combined(ink)[0].items} == {"style"}, "only where it is asked for"


def test_a_weight_that_weighs_nothing_is_said(caplog):
    made, text = combined(dataset(), prior_weight=0.5)
    assert text.endswith(made.notes[0]) and "prior_weight = 0.5 changes nothing" in caplog.text
    both, _ = combined(made, prior_weight=0.5, prior_share=0.25)
    assert (
        both.notes[0] == made.notes[0] and "prior_weight = 0.5 and prior_share = 0.25 change nothing" in both.notes[1]
    )
    others = dataset("none", 1, "plain")
    for used in (
        {},
        {"regularisation": others, "prior_weight": 2.0},
        {"prior_target": "base model", "prior_share": 0.1},
    ):
        assert combined(dataset(), **used)[0].notes == ()


def test_datasets_chain():
    first, _ = combined(dataset("ink"), dataset("oil"))
    made, _ = combined(first, dataset("pastel"), regularisation=dataset("none", 1, "plain"))
    assert [item.concept.style_phrase for item in made.items] == ["ink", "oil", "pastel", "none"]
    assert len({item.name for item in made.items}) == 4
    again, _ = combined(made, dataset("gouache"))
    assert again.prior_share == made.prior_share and again.items[3].concept.role == "pictures"


def test_user_s_conditioning_travels():
    entry = [torch.rand(1, 4, 8), {}]
    encoded = dataset(captions=[""], conditioning=[[entry]])
    made, _ = combined(dataset(), encoded)
    assert made.items[1].caption in made.answers and made.items[0].caption not in made.answers


def test_what_cannot_be_combined_is_named():
    regularised, _ = combined(dataset(), regularisation=dataset("none", 1, "plain"), prior_share=0.25)
    with pytest.raises(ValueError, match="regularisation pictures of its own"):
        combined(dataset(), regularisation=regularised)
    with pytest.raises(ValueError, match=r"several shares of samples, \[0.25, 0.5\]"):
        combined(regularised, regularisation=dataset("none", 1, "plain"))
    for mode, caption in (("full", "a cat in ink style"), ("content", "a cat in ink"), ("plain", "a cat")):
        with pytest.raises(ValueError, match="without the style phrase"):
            combined(dataset("ink", 1, mode, captions=[caption]), prior_target="base model")
