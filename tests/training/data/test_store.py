"""Encoded prompts in SQLite files."""

import sqlite3

import pytest
import torch

from stylewright.training.data.prompts import remembered
from stylewright.training.data.store import Store


def made(value):
    return lambda: {"context": torch.full((1, 3, 2), value), "pooled": torch.full((1, 4), value).bfloat16()}


def never():
    raise AssertionError("it was made again")


def test_a_row_is_made_once_and_found_by_every_process(tmp_path):
    first = Store(tmp_path, 0).recall("prompt", "a", made(1.5))
    for process in (0, 1):
        again = Store(tmp_path, process).recall("prompt", "a", never)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) and again[name].dtype == first[name].dtype for name in first)
    assert Store(tmp_path, 1).recall("prompt", "b", made(2.0))["pooled"][0, 0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows-0.sqlite", "rows-1.sqlite"]
    with pytest.raises(AssertionError, match="made again"):
        Store(tmp_path).recall("other", "a", never)


@pytest.mark.parametrize("damage", [b"nothing", None])
def test_what_cannot_be_trusted_is_made_again(tmp_path, damage):
    Store(tmp_path).recall("prompt", "a", made(1.0))
    with sqlite3.connect(tmp_path / "rows-0.sqlite") as file:
        (tensors,) = file.execute("SELECT tensors FROM rows").fetchone()
        file.execute("UPDATE rows SET tensors = ?", (damage or tensors[:-1] + b"\x01",))
    file.close()
    (tmp_path / "rows-7.sqlite").write_bytes(b"no database at all, and of another process")
    assert Store(tmp_path).recall("prompt", "a", made(3.0))["context"][0, 0, 0] == 3
    assert Store(tmp_path).recall("prompt", "a", never)["context"][0, 0, 0] == 3


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Cannot keep encoded prompts in .*rows-0\.sqlite"):
        Store(tmp_path / "file")


def test_prompts_are_encoded_once(tmp_path):
    asked = []

    def encode(prompts):
        asked.extend(prompts)
        return {"context": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    rows = remembered(encode, Store(tmp_path), "toy")(["a", "bcd", "a"])
    assert [each for each in asked if each] == ["a", "bcd"] and rows["context"].flatten().tolist() == [1, 3, 1]
    remembered(encode, Store(tmp_path), "another")(["a"])
    assert [each for each in asked if each] == ["a", "bcd", "a"]
