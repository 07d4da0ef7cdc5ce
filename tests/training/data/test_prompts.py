"""Prompts by the line, with alternatives."""

import tracemalloc
from collections import Counter

import pytest
import torch

from stylewright.training.data.cache import Cache
from stylewright.training.data.prompts import Prompts, read_line, read_prompts, remembered
from stylewright.training.embedded.grammar import grammar
from stylewright.training.embedded.vocabulary import tokenize


def test_a_line_stands_for_every_combination_once():
    line = read_line("{circle|star} in {red|blue|} style")
    made = [line.prompt(number) for number in range(len(line))]
    assert len(line) == 6 and len(set(made)) == 6
    assert "star in blue style" in made and "circle in  style" in made


def test_a_line_without_braces_is_itself():
    assert [read_line("a tree").prompt(0)] == ["a tree"]


@pytest.mark.parametrize("text", ["{a|b", "a}", "{a|{b|c}}"])
def test_braces_that_do_not_match_are_refused(text):
    with pytest.raises(ValueError, match="brace"):
        read_line(text)
    with pytest.raises(ValueError, match="do not nest") as caught:
        read_line(text + 10_000 * "x")
    assert len(str(caught.value)) < 400


def test_each_line_is_as_likely_as_any_other_and_each_of_its_prompts():
    prompts = Prompts(("{a|b|c|d}", "e"))
    count = Counter(prompt for step in range(400) for prompt in prompts.drawn(0, step, 10))
    assert count["e"] == pytest.approx(2000, abs=130)  # four deviations
    assert [count[each] for each in "abcd"] == pytest.approx([500] * 4, abs=90)


def test_what_is_drawn_is_a_function_of_seed_and_step():
    prompts = Prompts(("{a|b|c|d}{a|b|c|d}{a|b|c|d}",))
    assert prompts.drawn(0, 5, 8) == prompts.drawn(0, 5, 8)
    assert prompts.drawn(0, 5, 8) != prompts.drawn(0, 6, 8) != prompts.drawn(1, 6, 8)


def test_a_file_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# subjects\n\n a tree \nein {Haus|Stern} in blauem Stil\n", encoding="utf-8")
    lines = read_prompts(file, tmp_path / "cache")
    assert tuple(lines) == ("a tree", "ein {Haus|Stern} in blauem Stil")
    for text, words in (
        ("# nothing\n", "no prompts"),
        ("a\na {tree\n", r"prompts\.txt, line 2: .*brace"),
        (b"\xff\n", "line 1: no UTF-8"),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=words):
            read_prompts(file, tmp_path / "cache")
    with pytest.raises(ValueError, match="Cannot read"):
        read_prompts(tmp_path / "none.txt", tmp_path / "cache")


def test_a_file_is_told_by_what_is_in_it(tmp_path):
    file = tmp_path / "prompts.txt"
    marks = set()
    for text in ("a tree\n", "a house\n", "a tree\n"):
        file.write_text(text)
        marks.add(Prompts((), read_prompts(file, tmp_path)).fingerprint())
    assert len(marks) == 2
    assert Prompts((), read_prompts(file, tmp_path), "ink").fingerprint() not in marks


def test_a_long_file_stays_on_disk(tmp_path):
    """Of which only what is drawn is read."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"# {n}\n\n prompt {n} \n" for n in range(70_000)))
    prompts = Prompts(("first",), read_prompts(file, tmp_path))
    assert prompts.count == 70_001
    assert [prompts.file[n] for n in (0, 65_535, 65_536, -1)] == [f"prompt {n}" for n in (0, 65_535, 65_536, 69_999)]
    tracemalloc.start()
    drawn = Prompts(("first",), read_prompts(file, tmp_path)).drawn(0, 3, 16)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert drawn == prompts.drawn(0, 3, 16) and len(set(drawn)) == 16
    assert most < 300_000, "bytes, and the file has 2.5 million"


def test_no_lines_are_refused():
    with pytest.raises(ValueError, match="no prompts"):
        Prompts(())
    with pytest.raises(ValueError, match="' ', which is empty"):
        Prompts(("a star", " "))


def test_a_prompt_is_encoded_once_and_found_again(tmp_path):
    asked = []

    def encode(prompts):
        asked.extend(prompts)
        return {"context": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    for _ in range(2):
        rows = remembered(encode, Cache(tmp_path), "toy")(["a", "bcd", "a"])
        assert rows["context"].tolist() == [[1.0], [3.0], [1.0]]
    assert [each for each in asked if each] == ["a", "bcd"]
    remembered(encode, Cache(tmp_path), "another")(["a"])
    assert [each for each in asked if each] == ["a", "bcd", "a"]


def test_another_encoder_of_the_same_name_is_asked_itself(tmp_path):
    def encoder(size):
        return remembered(
            lambda prompts: {"context": torch.tensor([[size + len(prompt)] for prompt in prompts])},
            Cache(tmp_path),
            "toy",
        )

    for size in (1.0, 2.0, 1.0):
        assert encoder(size)(["ab"])["context"].item() == size + 2


def test_the_embedded_models_grammar_has_words_that_it_knows_only():
    for text in grammar():
        line = read_line(text)
        for number in (0, len(line) // 2, len(line) - 1):
            assert not tokenize(line.prompt(number)).unknown
