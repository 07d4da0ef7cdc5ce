"""Phrases: in the prompt, by the template, and their tokens by any tokenizer."""

import re

import pytest

from stylewright.training.concepts.phrases import Phrases, place_in, read_phrases, sub_prompts, tokens_of
from stylewright.training.embedded.vocabulary import INDEX, tokenize

PROMPT = "a woman with a laptop and a pot of plant, light blue circle in flat cartoon style"


def test_every_concept_meets_every_style_by_the_template():
    phrases = read_phrases(PROMPT, "a woman\nlaptop\n\n a pot of  plant", "flat cartoon\nlight blue circle")
    assert phrases.content == ("a woman", "laptop", "a pot of plant")
    assert [prompt for *_, prompt in sub_prompts(phrases)] == [
        "a woman in flat cartoon style",
        "a woman in light blue circle style",
        "laptop in flat cartoon style",
        "laptop in light blue circle style",
        "a pot of plant in flat cartoon style",
        "a pot of plant in light blue circle style",
    ]


@pytest.mark.parametrize(
    ("content", "style", "message"),
    [
        ("", "flat cartoon", "no content phrases"),
        ("a woman", " \n", "no style phrase"),
        ("a woman\nlap", "flat cartoon", r"no part of the prompt: 'lap'.*word by word"),  # of "laptop", no whole word
        ("a woman\nlaptop\na woman", "flat cartoon", "twice: 'a woman'"),
        ("a woman\nflat cartoon", "flat cartoon", "'flat cartoon' is a content phrase and a style phrase"),
    ],
)
def test_phrases_that_mean_nothing_are_named(content, style, message):
    with pytest.raises(ValueError, match=message):
        read_phrases(PROMPT, content, style)


def test_places_are_of_whole_words_in_any_case():
    assert PROMPT[slice(*place_in(PROMPT, "LAPTOP"))] == "laptop"
    assert place_in("cats and a cat", "cat") == (11, 14)
    assert place_in("a cat", "dog") is None


def clip_like(text):
    """Begin, pieces of up to three letters, end, and the end again as padding."""
    pieces = [piece for word in re.findall(r"\w+|[^\w\s]", text) for piece in re.findall(r".{1,3}", word)]
    ids = ["<begin>", *pieces, "<end>"]
    return ids + ["<end>"] * (40 - len(ids))


def t5_like(text):
    """No begin, another end than the padding."""
    return [*clip_like(text)[1 : clip_like(text).index("<end>")], "</s>", "<pad>", "<pad>"]


def bare(text):
    return [*t5_like(text)[:-3]]


@pytest.mark.parametrize("ids", [clip_like, t5_like, bare])
@pytest.mark.parametrize("phrase", ["a woman", "laptop", "a pot of plant", "flat cartoon", "style"])
def test_tokens_are_those_of_the_words(ids, phrase):
    places = tokens_of(ids, PROMPT, phrase)
    assert "".join(ids(PROMPT)[place] for place in places) == phrase.replace(" ", "")


def embedded(text):
    return tokenize(text).indices


@pytest.mark.parametrize(
    "prompt",
    [
        "star and a house in <v0> style",
        "star and a house in <v0>",  # the last token is a phrase's
        "star house in ocean dots solid crisp bauhaus <v0> style",  # as many tokens as there is room for
    ],
)
def test_tokens_of_the_embedded_model(prompt):
    words = {"star": 0, "a house": 1, "house": 1, "<v0>": embedded(prompt).index(INDEX["<v0>"])}
    for phrase, place in words.items():
        if place_in(prompt, phrase):
            assert tokens_of(embedded, prompt, phrase) == range(place, place + 1)


def test_a_phrase_without_tokens_is_named():
    with pytest.raises(ValueError, match="no token for the phrase 'with a'"):
        tokens_of(embedded, "star with a house in <v0> style", "with a")


def test_a_phrase_may_hold_signs():
    assert Phrases("a cat (black) in ink, wet style", ("a cat (black)",), ("ink, wet",)).content == ("a cat (black)",)
