from dataclasses import replace

import pytest
import torch

from stylewright.training.embedded import evaluate
from stylewright.training.embedded.evaluate import PROMPT_SETS, by_name, by_words, figures, judge, unseen_combinations
from stylewright.training.embedded.oracle import Scores, score
from stylewright.training.embedded.renderer import SEEN_PALETTES, SUBJECTS, held_out_combinations
from stylewright.training.embedded.vocabulary import PAD, WORDS, named_styles, tokenize
from stylewright.training.hosts.generate import generate

DRAWING = {"seed": 11, "guidance_scale": 3.0, "steps": 10}


@pytest.mark.parametrize("prompts", PROMPT_SETS.values(), ids=list(PROMPT_SETS))
def test_prompts_are_known_words_and_a_function_of_the_seed(prompts):
    asked = prompts(25, 3)
    assert len(asked) == 25
    assert [prompt.subject for prompt in asked] == [i % len(SUBJECTS) for i in range(25)]
    assert not any(tokenize(prompt.text).unknown for prompt in asked)
    assert asked == prompts(25, 3) != prompts(25, 4)


def words_of(prompt):
    return [WORDS[i] for i in tokenize(prompt.text).indices if i != PAD]


def test_prompts_say_what_the_right_picture_shows():
    for prompt in by_words(40, 0):
        assert words_of(prompt) == [SUBJECTS[prompt.subject], *prompt.style.words]
        assert prompt.style in named_styles().values()
    for prompt in by_name(40, 0):
        subject, name = words_of(prompt)
        assert subject == SUBJECTS[prompt.subject] and named_styles()[name] == prompt.style


def test_unseen_combinations_are_unseen():
    styles = {prompt.style for prompt in unseen_combinations(60, 0)}
    assert styles <= set(held_out_combinations()) and len(styles) > 20
    for prompt in unseen_combinations(5, 0):
        assert words_of(prompt)[1:] == list(prompt.style.words)


def test_figures_are_shares_with_intervals():
    style = {"palette": [1, 1, 1, 1], "ground": [1, 1, 0, 1], "fill": [0, 1, 1, 1], "edge": [1, 1, 1, 1]}
    scores = Scores(torch.tensor([1, 1, 1, 0]).bool(), {name: torch.tensor(row).bool() for name, row in style.items()})
    shares = figures(scores)
    assert {name: value.mean for name, value in shares.items()} == {
        "subject": 0.75,
        "palette": 1.0,
        "ground": 0.75,
        "fill": 0.75,
        "edge": 1.0,
        "whole style": 0.5,
        "everything": 0.25,
    }
    assert shares["palette"].low == shares["palette"].high == 1
    assert shares["subject"].low < 0.75 < shares["subject"].high and shares["subject"].n == 4


def test_batches_are_parts_of_one_series(monkeypatch):
    """Picture i is asked for by its number, whatever the size of a batch."""
    calls = []

    def numbered(host, prompts, *, seed, first, **options):
        calls.append((len(prompts), seed, options))
        return torch.arange(first, first + len(prompts)).float().view(-1, 1, 1, 1)

    monkeypatch.setattr(evaluate, "generate", numbered)
    options = {"seed": 5, "guidance_scale": 2.0, "steps": 9}
    for batch in (2, 3, 50):
        pictures = evaluate.draw(None, list("abcdefg"), batch=batch, **options)
        assert pictures.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert [size for size, _, _ in calls] == [2, 2, 2, 1, 3, 3, 1, 7]
    wanted = {"guidance_scale": 2.0, "steps": 9, "one_step": None}
    assert all(seed == 5 and given == wanted for _, seed, given in calls)


@pytest.fixture(scope="module")
def drawn(shipped_host):
    """20 pictures of the shipped model at its usual guidance, in half the usual steps, and what they should show."""
    prompts = by_words(20, 11)
    return prompts, evaluate.draw(shipped_host, [prompt.text for prompt in prompts], **DRAWING)


def test_the_shipped_model_draws_what_it_is_asked_for(drawn, shipped_host, shipped_oracle, monkeypatch):
    prompts, pictures = drawn
    monkeypatch.setattr(evaluate, "draw", lambda *_, **__: pictures)
    scores = judge(shipped_host, shipped_oracle, prompts, **DRAWING)
    shares = {name: value.mean for name, value in figures(scores).items()}
    assert shares["palette"] >= 0.9, shares
    assert min(shares[name] for name in ("subject", "ground", "fill", "edge")) >= 0.6, shares


def test_the_shipped_model_tells_prompts_apart(drawn, shipped_oracle):
    """Against subjects and palettes that were not asked for, the same pictures are wrong."""
    prompts, pictures = drawn
    subjects = torch.tensor([(prompt.subject + 1) % len(SUBJECTS) for prompt in prompts])
    styles = [replace(prompt.style, palette=(prompt.style.palette + 1) % SEEN_PALETTES) for prompt in prompts]
    scores = score(shipped_oracle, pictures, subjects, styles)
    assert scores.subject.float().mean() <= 0.2 and scores.style["palette"].float().mean() <= 0.1


def test_a_picture_of_the_shipped_model_is_the_same_drawn_alone(drawn, shipped_host):
    prompts, pictures = drawn
    alone = generate(shipped_host, [prompts[3].text], first=3, **DRAWING)
    assert (alone[0] - pictures[3]).abs().max() < 0.02
    assert (alone[0] - pictures[4]).abs().mean() > 0.05
