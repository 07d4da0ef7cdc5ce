import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylewright.training.data.cache import Cache, digest, digest_named, settle
from stylewright.training.errors import TrainingError


class Maker:
    """Makes the same tensors each time and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(1, 4, dtype=torch.bfloat16)}


def same(left, right):
    return set(left) == set(right) and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_made_once_and_read_back_exactly(tmp_path):
    make = Maker()
    first = Cache(tmp_path / "new" / "folder").recall("text", "key", make)
    again = Cache(tmp_path / "new" / "folder").recall("text", "key", make)
    assert make.calls == 1
    assert same(first, again) and same(first, make())
    assert only_file(tmp_path / "new" / "folder").name.startswith("text-")


def test_kinds_and_keys_are_different_entries(tmp_path):
    make, cache = Maker(), Cache(tmp_path)
    for kind, key in [("text", "1"), ("text", "2"), ("latent", "1")]:
        cache.recall(kind, key, make)
    assert make.calls == len(list(tmp_path.iterdir())) == 3


def test_without_a_folder_nothing_is_kept():
    make = Maker()
    Cache(None).recall("text", "key", make)
    Cache(None).recall("text", "key", make)
    assert make.calls == 2


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_by_a_foreign_file(path):
    save_file({name: tensor.contiguous() for name, tensor in Maker()().items()}, path)


def replace_by_another_entry(path):
    folder = path.parent / "other"
    Cache(folder).recall("text", "another key", lambda: {"a": torch.zeros(2)})
    os.replace(only_file(folder), path)
    folder.rmdir()


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, replace_by_a_foreign_file, replace_by_another_entry])
def test_damaged_files_are_made_again(tmp_path, caplog, damage):
    make, cache = Maker(), Cache(tmp_path)
    cache.recall("text", "key", make)
    path = only_file(tmp_path)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert same(cache.recall("text", "key", make), make())
    assert path.name in caplog.text
    assert same(load_file(path), make())
    calls = make.calls
    assert same(cache.recall("text", "key", make), Maker()())
    assert make.calls == calls


def test_a_failing_maker_leaves_nothing(tmp_path):
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Cache(tmp_path).recall("text", "key", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache folder .*file"):
        Cache(tmp_path / "file")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a disk that is full")
def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(tensors, path, header):
        path.write_bytes(b"half")
        with Path("/dev/full").open("wb", buffering=0) as disk:
            disk.write(b"the other half")

    monkeypatch.setattr("stylewright.training.data.cache.save_file", full)
    with pytest.raises(TrainingError, match=r"Cannot write .*text-.*No space left"):
        Cache(tmp_path).recall("text", "key", Maker())
    assert list(tmp_path.iterdir()) == []


def test_the_digest_tells_content_dtype_shape_and_place_apart():
    zeros = torch.zeros(2, 3)
    different = [
        digest(zeros),
        digest(zeros.double()),
        digest(zeros.reshape(3, 2)),
        digest(zeros.flatten()),
        digest(torch.tensor([[0.0, 0, 0], [0, 0, 1e-30]])),
        digest(zeros, ""),
        digest("ab", "c"),
        digest("a", "bc"),
        digest("abc"),
        digest(1),
        digest(1, 2),
        digest(12),
        digest("1"),
        digest(torch.tensor(1.0)),
        digest(torch.zeros(0, 3)),
        digest(torch.zeros(2, dtype=torch.bool)),
        digest_named({"a": zeros}),
        digest_named({"b": zeros}),
    ]
    assert len(set(different)) == len(different)


def test_the_digest_does_not_depend_on_layout_or_order():
    values = torch.rand(3, 4, 5)
    assert digest(values.permute(2, 0, 1)) == digest(values.permute(2, 0, 1).contiguous())
    assert digest_named({"a": values, "b": values + 1}) == digest_named({"b": values + 1, "a": values})


def test_settled_tensors_train_although_they_were_made_in_inference_mode():
    with torch.inference_mode():
        made = torch.rand(2, 3)
        settled = settle(made)
    assert made.is_inference() and not settled.is_inference()
    weight = torch.ones(3, requires_grad=True)
    (weight * settled).sum().backward()
    assert torch.allclose(weight.grad, settled.sum(0))


def test_settled_tensors_are_copies_without_history():
    source = torch.rand(4, requires_grad=True)
    settled = settle(source * 1)
    assert not settled.requires_grad
    plain = torch.zeros(3)
    settle(plain).add_(1)
    assert plain.sum() == 0


def test_read_back_in_inference_mode_they_train_too(tmp_path):
    with torch.inference_mode():
        for _ in range(2):
            tensors = Cache(tmp_path).recall("text", "key", Maker())
            assert not any(tensor.is_inference() for tensor in tensors.values())
