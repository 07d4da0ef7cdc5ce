import json

import pytest
import torch
from PIL import Image

from stylewright.training.data.concepts import Concept
from stylewright.training.data.items import Item, check_pictures, items_from_memory, phrase_among, read_folder


def picture(path, mode="RGB", size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, "white").save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("b.PNG", "a.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "b.txt").write_text("a dog")
    return tmp_path


def test_text_files_beside_pictures(folder):
    (folder / "._a.jpg").write_bytes(b"what macOS leaves behind")
    (folder / "notes.md").write_text("not a caption")
    picture(folder / "subfolder" / "c.png")
    items = read_folder(folder, repeats=3, concept=Concept(style_phrase="ink wash"))
    assert [item.image.name for item in items] == ["a.jpg", "b.PNG"]
    assert [item.caption for item in items] == ["a cat", "a dog"]
    assert {(item.repeats, item.concept.style_phrase, item.mask) for item in items} == {(3, "ink wash", None)}
    assert items[0].name == str(folder / "a.jpg")


def test_masks_beside_pictures_and_in_their_transparency(folder):
    mask = picture(folder / "a_mask.png")
    assert [item.mask for item in read_folder(str(folder))] == [mask, None]
    assert [item.mask for item in read_folder(folder, alpha_masks=True)] == [mask, folder / "b.PNG"]


def test_a_list_with_pictures_elsewhere_and_text_files_for_the_rest(folder):
    other = picture(folder / "more" / "c.png")
    mask = picture(folder / "more" / "c_mask.webp")
    rows = [{"file": "more/c.png", "caption": "a cow", "repeats": 2}, {"file": "more/c.png", "caption": "the cow"}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = read_folder(folder, repeats=5)
    found = [(item.image.name, item.caption, item.repeats) for item in items]
    assert found == [("c.png", "a cow", 10), ("c.png", "the cow", 5), ("a.jpg", "a cat", 5), ("b.PNG", "a dog", 5)]
    assert items[0].image == other and items[0].mask == mask


def test_a_line_may_have_a_style_phrase_of_its_own(folder, caplog):
    (folder / "list.jsonl").write_text('{"file": "a.jpg", "caption": "a cat in ink style", "style_phrase": "ink"}')
    items = read_folder(folder / "list.jsonl")
    assert items[0].concept.style_phrase == phrase_among(items) == "ink" and not caplog.text
    (item,) = read_folder(folder / "list.jsonl", concept=Concept(style_phrase="oil"))
    assert item.concept.style_phrase == "ink" and "'ink', and keep it: 'oil' is not theirs" in caplog.text
    (folder / "list.jsonl").write_text('{"file": "a.jpg", "caption": "a cat", "style_phrase": 1}')
    with pytest.raises(ValueError, match="the style phrase 1 is no text"):
        read_folder(folder / "list.jsonl")


def test_a_list_named_itself_is_all_there_is(folder):
    (folder / "one.jsonl").write_text('{"image": "./a.jpg", "text": "one cat", "mask": "b.PNG"}')
    (folder / "two.jsonl").write_text('{"image": "b.PNG", "text": "two dogs"}')
    (item,) = read_folder(folder / "one.jsonl")
    assert (item.image, item.caption, item.mask) == (folder / "a.jpg", "one cat", folder / "b.PNG")
    with pytest.raises(ValueError, match=r"several \.jsonl files \(one\.jsonl, two\.jsonl\)"):
        read_folder(folder)


def test_everything_that_does_not_fit_together_is_named_at_once(folder):
    (folder / "a.txt").unlink()
    (folder / "x.txt").write_text("no picture")
    picture(folder / "y_mask.png")
    row = {"file": "gone.png", "caption": "c", "mask": "gone_mask.png"}
    (folder / "list.jsonl").write_text(json.dumps(row) + '\n{"file": "b.PNG", "text": "twice"}')
    with pytest.raises(ValueError) as error:
        read_folder(folder)
    lines = str(error.value).splitlines()[1:]
    for line, (start, name) in zip(
        lines,
        [
            ("Pictures without captions", "a.jpg"),
            ("Pictures with a caption in the .jsonl file and in a .txt file", "b.PNG"),
            ("Captions without pictures", "x.txt"),
            ("Pictures that are listed but missing", "gone.png (list.jsonl:1)"),
            ("Masks that are listed but missing", "gone_mask.png (list.jsonl:1)"),
            ("Masks without pictures", "y_mask.png"),
        ],
        strict=True,
    ):
        assert line.startswith(f"- {start}: ") and name in line


def test_long_lists_are_cut(folder):
    for number in range(9):
        picture(folder / f"p{number}.png")
    with pytest.raises(ValueError, match=r"p0\.png, p1\.png, .* and 4 more"):
        read_folder(folder)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder .*gone"):
        read_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"No pictures in .*expected png, jpg.*found no files$"):
        read_folder(tmp_path)
    (tmp_path / "photo.heic").write_bytes(b"")
    picture(tmp_path / "concept" / "a.png")
    with pytest.raises(ValueError, match=r"found photo\.heic\. Its subfolders \(concept\) are not searched"):
        read_folder(tmp_path)
    picture(tmp_path / "a_mask.png")
    with pytest.raises(ValueError, match=r"only masks \(a_mask\.png\)"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match=r"a_mask\.png is a file: expected a folder"):
        read_folder(tmp_path / "a_mask.png")


def test_empty_captions_are_named(folder):
    (folder / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"Empty captions: b\.txt"):
        read_folder(folder)


def test_unreadable_encodings_are_named(folder):
    (folder / "b.txt").write_bytes("Öl".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        read_folder(folder)


def test_from_memory():
    images = torch.rand(2, 3, 5, 8)
    items = items_from_memory(
        images, ["a cat", "a\ndog"], [None, torch.ones(5, 8)], repeats=2, concept=Concept(style_phrase="ink")
    )
    assert [item.caption for item in items] == ["a cat", "a dog"]
    assert [item.name for item in items] == ["picture 1", "picture 2"]
    assert items[0].mask is None and items[1].mask.shape == (5, 8)
    assert items[1].image.data_ptr() == images[1].data_ptr()
    assert [item.caption for item in items_from_memory(images, "a cat")] == ["a cat", "a cat"]


def test_counts_have_to_agree():
    images = [torch.rand(3, 5, 8)] * 2
    with pytest.raises(ValueError, match="2 pictures and 3 captions"):
        items_from_memory(images, ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 pictures and 1 masks"):
        items_from_memory(images, ["a", "b"], torch.ones(1, 5, 8))
    with pytest.raises(ValueError, match="no pictures"):
        items_from_memory([], [])


@pytest.mark.parametrize("repeats", [0, -1, 1.5])
def test_repeats_are_whole_numbers(repeats):
    with pytest.raises(ValueError, match=r"repeats of cat\.png"):
        Item(torch.rand(3, 5, 8), "a cat", repeats=repeats, name="cat.png")


def test_a_list_may_be_kept_to_a_folder(tmp_path):
    """On a shared server a list that somebody uploaded should not open whatever the server can read."""
    picture(tmp_path / "inside" / "mask.png")
    picture(tmp_path / "outside" / "b.png")
    row = {"file": "../outside/b.png", "caption": "a cat", "mask": "mask.png"}
    (tmp_path / "inside" / "list.jsonl").write_text(json.dumps(row))
    assert len(read_folder(tmp_path / "inside" / "list.jsonl", within=tmp_path)) == 1
    with pytest.raises(ValueError, match=r"listed and not below .*inside: .*b\.png \(list\.jsonl:1\)$"):
        read_folder(tmp_path / "inside" / "list.jsonl", within=tmp_path / "inside")


def test_everything_that_cannot_be_opened_is_named_at_once(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_text("no picture")
    items = items_from_memory([torch.rand(3, 8, 8)] * 2, "a cat")
    check_pictures(items)
    bad = [Item(tmp_path / f"{name}.png", "a cat", name=name) for name in ("one", "two")]
    with pytest.raises(ValueError) as caught:
        check_pictures([*items, *bad])
    assert "one.png" in str(caught.value) and "two.png" in str(caught.value)


def test_pictures_and_captions_that_cannot_be_used_are_named_together(folder):
    """Nobody should mend a folder one message at a time."""
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a cow")
    picture(folder / "dot.png", size=(1, 1))
    (folder / "a.txt").write_text(" \n")
    (folder / "b.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(ValueError) as error:
        read_folder(folder)
    text = str(error.value)
    assert text.startswith(f"{folder} cannot be trained on:\n- ")
    for part in ("without captions: dot.png", "Empty captions: a.txt", "b.txt", "broken.png", "dot.png is 1x1 pixels"):
        assert part in text, part


def test_what_lies_outside_is_not_opened(folder):
    (folder / "in").mkdir()
    (folder / "secret.png").write_bytes(b"no picture")
    (folder / "in" / "list.jsonl").write_text('{"file": "../secret.png", "caption": "c"}')
    with pytest.raises(ValueError, match="not below") as error:
        read_folder(folder / "in", within=folder / "in")
    assert "Cannot read" not in str(error.value)


def test_every_line_of_a_list_that_cannot_be_used_is_named(folder):
    (folder / "list.jsonl").write_text('{"file": "a.jpg", "caption": ""}\nnonsense\n{"file": "b.PNG", "caption": "ok"}')
    with pytest.raises(ValueError, match=r"line 1: 'caption' is ''(?s:.*)line 2 is not JSON"):
        read_folder(folder)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (200, 7)])
def test_a_picture_that_shows_nothing_is_named_with_its_size(size, tmp_path):
    item = Item(picture(tmp_path / "it.png", size=size), "a cat", name="it.png")
    with pytest.raises(ValueError, match=f"it.png is {size[0]}x{size[1]} pixels.*at least 8 a side"):
        check_pictures([item])
