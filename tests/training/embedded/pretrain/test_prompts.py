import pytest
import torch

from stylewright.training.embedded.pretrain import prompts as module
from stylewright.training.embedded.pretrain.prompts import prompts
from stylewright.training.embedded.pretrain.scenes import RANDOM_PALETTE, training_scenes
from stylewright.training.embedded.renderer import EDGES, FILLS, GROUNDS, PALETTES, SUBJECTS
from stylewright.training.embedded.vocabulary import FREE_WORDS, PAD, SLOTS, STYLE_NAMES, WORDS, named_styles, tokenize

N = 20_000
TABLES = (tuple(PALETTES), GROUNDS, FILLS, EDGES)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def attributes(n=N):
    scenes = training_scenes(n, 1, "prompts", named=0.25)
    return torch.stack([scenes.subject, scenes.palette, scenes.ground, scenes.fill, scenes.edge], 1)


@pytest.fixture(scope="module")
def pairs():
    """Attributes (n, 5), and the words of each prompt without padding."""
    rows = attributes()
    return rows, [[WORDS[i] for i in prompt if i != PAD] for prompt in prompts(rows, draw()).tolist()]


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


def test_every_word_is_true_of_its_picture(pairs):
    names = {style: name for name, style in named_styles().items()}
    for (subject, *style), words in zip(pairs[0].tolist(), pairs[1], strict=True):
        true = {SUBJECTS[subject], *(table[i] for table, i in zip(TABLES, style, strict=True) if i >= 0)}
        true |= {name for each, name in names.items() if list(vars(each).values()) == style}
        true |= set(FREE_WORDS) if style[0] < 0 else set()
        assert set(words) <= true
        assert len(set(words)) == len(words)


def test_a_name_and_a_free_word_stand_for_the_whole_style(pairs):
    for words in pairs[1]:
        style = [word for word in words if word not in SUBJECTS]
        if any(word in STYLE_NAMES or word in FREE_WORDS for word in style):
            assert len(style) == 1


def test_shares_are_what_the_constants_say(pairs):
    rows, words = pairs
    kept = (1 - module.DROP_PROMPT) * (1 - module.DROP_STYLE)
    nameless = [w for w, palette in zip(words, rows[:, 1].tolist(), strict=True) if palette < 0]
    free = share(any(word in FREE_WORDS for word in w) for w in nameless)
    assert free == pytest.approx(kept * module.FREE_WORD, abs=0.02)
    assert len(nameless) / N == pytest.approx(RANDOM_PALETTE, abs=0.02)
    styles = {tuple(vars(style).values()) for style in named_styles().values()}
    named = [w for w, row in zip(words, rows[:, 1:].tolist(), strict=True) if tuple(row) in styles]
    assert share(any(word in STYLE_NAMES for word in w) for w in named) == pytest.approx(kept * module.NAME, abs=0.02)
    subjects = share(any(word in SUBJECTS for word in w) for w in words)
    assert subjects == pytest.approx((1 - module.DROP_PROMPT) * (1 - module.DROP_SUBJECT), abs=0.01)
    assert share(not w for w in words) > module.DROP_PROMPT  # the empty prompt is learned, for guidance


def test_single_words_are_left_out_now_and_then(pairs):
    words = [w for w in pairs[1] if any(word in EDGES for word in w)]
    assert share(any(word in FILLS for word in w) for w in words) == pytest.approx(1 - module.DROP_WORD, abs=0.01)


def test_every_free_word_is_used(pairs):
    used = [word for words in pairs[1] for word in words if word in FREE_WORDS]
    counts = torch.tensor([used.count(word) for word in FREE_WORDS]).float()
    assert counts.min() > 0.85 * counts.mean()


def test_prompts_are_a_function_of_the_draw():
    rows = attributes(30)
    indices = prompts(rows, draw())
    assert indices.shape == (30, SLOTS) and indices.dtype == torch.int64
    assert torch.equal(indices, prompts(rows, draw()))
    assert not torch.equal(indices, prompts(rows, draw(1)))


def test_they_are_the_words_that_a_user_would_type(monkeypatch):
    """With nothing dropped a prompt in training is the template's."""
    for name in ("NAME", "FREE_WORD", "DROP_WORD", "DROP_SUBJECT", "DROP_STYLE", "DROP_PROMPT"):
        monkeypatch.setattr(module, name, 0.0)
    style = named_styles()["jazz"]
    row = torch.tensor([[3, *vars(style).values()]])
    typed = tokenize(f"{SUBJECTS[3]} in {' '.join(style.words)} style").indices
    assert sorted(prompts(row, draw())[0].tolist()) == sorted(typed)
    monkeypatch.setattr(module, "NAME", 1.0)
    typed = tokenize(f"{SUBJECTS[3]} in jazz style").indices
    assert sorted(prompts(row, draw())[0].tolist()) == sorted(typed)
