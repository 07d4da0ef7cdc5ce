import json

import pytest

from stylewright.training.data.captions import Caption, complete, contains, read_rows, read_text, styled, tag_orders


def given(text, phrase="ink wash", name="a.png"):
    return Caption(name, text, phrase)


def test_a_content_gets_the_template():
    assert styled("a cat", "watercolor painting") == "a cat in watercolor painting style"


def test_punctuation_at_the_end_and_line_breaks_do_not_reach_the_template():
    assert styled("a cat,\n on a  mat. ", " ink  wash ") == "a cat, on a mat in ink wash style"


def test_a_caption_with_the_phrase_stays_and_so_the_template_is_idempotent():
    once = styled("a cat", "ink wash")
    assert styled(once, "ink wash") == once
    assert styled("An Ink Wash of a cat", "ink wash") == "An Ink Wash of a cat"


@pytest.mark.parametrize("caption", ["drinks", "drink", "inkwell", "pink ink", "ink", "an ink\nwash"])
def test_the_phrase_is_found_as_whole_words_only(caption):
    assert contains(caption, "ink") == (caption in ("pink ink", "ink", "an ink\nwash"))


def test_the_phrase_is_text_and_not_a_pattern():
    assert contains("a cat in c++ (flat) style", "c++ (flat)")
    assert not contains("a cat in cc flat style", "c++ (flat)")
    assert styled("{content} {0}", "{x}") == "{content} {0} in {x} style"


def test_full_captions_are_left_alone():
    assert complete([given("ink  wash of a cat.")], "full") == ["ink wash of a cat."]
    assert complete([given("a cat", phrase="")], "full") == ["a cat"]


def test_full_captions_without_the_phrase_are_named():
    captions = [given("ink wash of a cat"), given("a dog", name="dog.png"), given("drinks, ink, wash", name="bar.png")]
    with pytest.raises(ValueError, match=r"'ink wash' is missing from 2 of 3.*dog.png \('a dog'\).*bar.png") as error:
        complete(captions, "full")
    assert "a.png" not in str(error.value)


def test_each_concept_has_its_own_phrase():
    captions = [given("a cat"), given("a dog", phrase="oil painting")]
    assert complete(captions) == ["a cat in ink wash style", "a dog in oil painting style"]


def test_an_empty_phrase_is_an_error_where_the_template_needs_it():
    with pytest.raises(ValueError, match="need a style phrase"):
        complete([given("a cat", phrase=" ")])
    with pytest.raises(ValueError, match="style phrase is empty"):
        styled("a cat", "")


def test_empty_captions_are_named():
    with pytest.raises(ValueError, match=r"without captions: b\.png"):
        complete([given("a cat"), given(" \n", name="b.png")])


def test_an_unknown_mode_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'templat'.*content, full"):
        complete([given("a cat")], "templat")


def test_text_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("﻿eine Ölskizze".encode())
    assert read_text(path) == "eine Ölskizze"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(("a cat" if encoding == "utf-16-le" else "Öl").encode(encoding))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize(("file", "caption"), [("file", "caption"), ("image", "text"), ("file_name", "prompt")])
def test_rows(tmp_path, file, caption):
    path = tmp_path / "list.jsonl"
    line = json.dumps({file: "sub/a.png", caption: "a\ncat", "mask": "m.png", "repeats": 3, "width": 5})
    path.write_text(f"\n{line}\n")
    (row,) = read_rows(path)
    assert (row.image, row.caption, row.mask) == (tmp_path / "sub/a.png", "a cat", tmp_path / "m.png")
    assert (row.repeats, row.place) == (3, "list.jsonl:2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.png"', "line 2 is not JSON"),
        ('["a.png", "a cat"]', "line 2: expected an object"),
        ('{"caption": "a cat"}', "line 2: expected one of the keys 'file' or 'image' or 'file_name', got"),
        ('{"file": "a.png", "image": "b.png", "text": "a cat"}', "expected one of the keys 'file'"),
        ('{"file": "a.png"}', "expected one of the keys 'caption'"),
        ('{"file": "a.png", "text": " "}', "'text' is ' ', expected text"),
        ('{"file": "a.png", "text": ["a"]}', "expected text"),
        ('{"file": "a.png", "text": "a", "repeats": 0}', "repeats is 0"),
        ('{"file": "a.png", "text": "a", "repeats": true}', "repeats is True"),
        ('{"file": "a.png", "text": "a", "mask": 1}', "mask 1 is not a file name"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path, line, message):
    path = tmp_path / "list.jsonl"
    path.write_text('{"file": "ok.png", "text": "ok"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_an_empty_list_is_an_error(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="is empty"):
        read_rows(path)


def test_tags_are_drawn_in_other_orders_and_each_once():
    text = "cat, red, small, old"
    orders = tag_orders(text, 24, 0, seed=0)
    assert orders[0] == text and len(set(orders)) == len(orders) == 24
    assert tag_orders(text, 100, 1, seed=0) == tag_orders(text, 6, 1, seed=0)
    assert all(order.startswith("cat, ") for order in tag_orders(text, 6, 1, seed=0))
    assert tag_orders(text, 4, 0, seed=0) != tag_orders(text, 4, 0, seed=1)


@pytest.mark.parametrize(
    ("text", "keep", "count"), [("a cat", 0, 1), ("cat, red", 2, 1), ("cat, cat, red", 0, 3), (" , cat ,, red,", 0, 2)]
)
def test_there_are_no_more_orders_than_tags_allow(text, keep, count):
    orders = tag_orders(text, 10, keep, seed=0)
    assert orders[0] == text and len(orders) == count
    assert all(sorted(tag.strip() for tag in order.split(",") if tag.strip()) for order in orders)


def test_plain_captions_need_no_phrase():
    assert complete([Caption("one", "a  cat\n", "ink")], "plain") == ["a cat"]
    with pytest.raises(ValueError, match="without captions: one"):
        complete([Caption("one", " ", "")], "plain")
