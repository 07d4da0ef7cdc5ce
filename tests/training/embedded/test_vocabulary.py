import pytest

from stylewright.training.embedded.renderer import (
    EDGES,
    FILLS,
    GROUNDS,
    HELD_OUT_STYLES,
    PALETTES,
    SEEN_GROUNDS,
    SEEN_PALETTES,
    SUBJECTS,
    held_out_combinations,
)
from stylewright.training.embedded.vocabulary import (
    FREE_WORDS,
    FUNCTION_WORDS,
    INDEX,
    PAD,
    SLOTS,
    STYLE_NAMES,
    WORDS,
    explain_unknown,
    named_styles,
    tokenize,
)

KINDS = (SUBJECTS, tuple(PALETTES)[:SEEN_PALETTES], GROUNDS[:SEEN_GROUNDS], FILLS, EDGES, STYLE_NAMES, FREE_WORDS)


def words_of(prompt):
    """The words behind a prompt's indices, padding aside."""
    return [WORDS[index] for index in tokenize(prompt).indices if index != PAD]


def test_every_word_has_one_place_and_one_index():
    words = [word for kind in KINDS for word in kind]
    assert len(words) == len(set(words))
    assert sorted(INDEX) == sorted([*words, WORDS[PAD]])
    assert [INDEX[word] for word in WORDS] == list(range(len(WORDS)))
    assert not FUNCTION_WORDS & set(words)


def test_what_is_held_out_has_no_word():
    held_out = {*tuple(PALETTES)[SEEN_PALETTES:], *GROUNDS[SEEN_GROUNDS:], *HELD_OUT_STYLES}
    assert len(held_out) == 4 + 1 + 8
    assert not held_out & set(WORDS)


def test_every_word_is_read_as_itself():
    for word in WORDS[1:]:
        assert words_of(f"A {word.upper()}, in the style of") == [word]


def test_a_prompt_is_its_words_in_order_padded():
    tokens = tokenize("Star in ocean stripes, hatched and CRISP style <v3>")
    assert len(tokens.indices) == SLOTS
    assert [WORDS[i] for i in tokens.indices] == [
        *("star", "ocean", "stripes", "hatched", "crisp", "<v3>"),
        *("<pad>", "<pad>"),
    ]
    assert tokens.unknown == []
    assert tokenize("").indices == [PAD] * SLOTS


def test_unknown_words_are_reported_in_order_and_leave_no_trace():
    tokens = tokenize("giraffe in moss-green style <v9> v0 star")
    assert tokens.unknown == ["giraffe", "moss", "green", "<v9>", "v0"]
    assert tokens.indices == tokenize("star").indices


def test_padding_cannot_be_asked_for():
    assert tokenize("<pad> star").indices == tokenize("star").indices


def test_too_many_words():
    full = " ".join(WORDS[1 : SLOTS + 1])
    assert PAD not in tokenize(f"a {full} style").indices
    with pytest.raises(ValueError, match=rf"{SLOTS + 1} words that carry meaning.* {SLOTS}, got 'circle square"):
        tokenize(f"{full} star")


def test_the_explanation_names_what_came_and_all_that_is_known():
    text = explain_unknown(["velvet", "<v9>"])
    assert "'velvet', '<v9>'" in text
    assert all(word in text for word in WORDS[1:])
    assert WORDS[PAD] not in text


def test_named_styles_are_distinct_and_not_held_out():
    styles = named_styles()
    assert tuple(styles) == STYLE_NAMES
    assert len(set(styles.values())) == len(styles)
    assert not set(styles.values()) & ({*held_out_combinations(), *HELD_OUT_STYLES.values()})
    assert all(style.palette < SEEN_PALETTES and style.ground < SEEN_GROUNDS for style in styles.values())


def test_named_styles_use_every_value():
    """Otherwise a name would be a hint to a value that it stands for alone."""
    columns = zip(*(vars(style).values() for style in named_styles().values()), strict=True)
    assert [len(set(column)) for column in columns] == [SEEN_PALETTES, SEEN_GROUNDS, len(FILLS), len(EDGES)]


def test_every_prompt_of_the_template_fits():
    for subject in SUBJECTS:
        for name, style in named_styles().items():
            assert words_of(f"{subject} in {name} style") == [subject, name]
            assert words_of(f"{subject} in {' '.join(style.words)} style") == [subject, *style.words]
