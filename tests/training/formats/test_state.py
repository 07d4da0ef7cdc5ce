"""Checkpoints: what goes in comes out, bit for bit, and nothing else is taken for one."""

import json
import math
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from stylewright.training.formats.state import load_state, save_state, write_atomically


def test_optimiser_state_comes_back(tmp_path):
    """What torch keeps has integer keys, tuples, and tensors of every kind."""
    weights = torch.nn.Parameter(torch.randn(3, 5))
    optimizer = torch.optim.AdamW([weights], lr=1e-3, betas=(0.9, 0.99))
    weights.grad = torch.randn(3, 5)
    optimizer.step()
    before = optimizer.state_dict()
    save_state(tmp_path / "state.safetensors", {"optimizer": before, "step": 7})
    after = load_state(tmp_path / "state.safetensors")
    assert after["step"] == 7
    assert after["optimizer"]["param_groups"] == before["param_groups"]
    assert isinstance(after["optimizer"]["param_groups"][0]["betas"], tuple)
    assert list(after["optimizer"]["state"]) == [0]
    for name, value in before["state"][0].items():
        assert torch.equal(after["optimizer"]["state"][0][name], value)
    torch.optim.AdamW([weights], lr=1.0).load_state_dict(after["optimizer"])


def test_every_kind_of_value(tmp_path):
    shared = torch.arange(12.0).view(3, 4)
    tree = {
        "views": [shared, shared[1:], shared.T],  # which share memory
        "types": (torch.tensor(True), torch.ones(2, dtype=torch.bfloat16), torch.empty(0, 3), torch.tensor(2**62)),
        "plain": [None, True, -3, 0.1, math.inf, "ä", {}, [], ()],
        1: {"tensor": "t0", "dict": [1]},  # our own words for what is inside
    }
    save_state(tmp_path / "state.safetensors", tree)
    got = load_state(tmp_path / "state.safetensors")
    for have, want in zip([*got["views"], *got["types"]], [*tree["views"], *tree["types"]], strict=True):
        assert have.dtype == want.dtype
        assert torch.equal(have, want)
    assert isinstance(got["types"], tuple)
    assert got["plain"] == tree["plain"]
    assert got[1] == tree[1]


def test_a_branch_and_a_header_are_read_alone(tmp_path):
    save_state(tmp_path / "state", {"a": {"b": torch.ones(2), "c": 3}, "d": [torch.zeros(3)]})
    assert load_state(tmp_path / "state", at=["a", "b"]).tolist() == [1, 1]
    assert load_state(tmp_path / "state", tensors=False) == {"a": {"b": None, "c": 3}, "d": [None]}
    with pytest.raises(KeyError):
        load_state(tmp_path / "state", at=["a", "z"])


def test_unknown_values_are_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot save a set in a checkpoint"):
        save_state(tmp_path / "state.safetensors", {"names": {"a"}})
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(tmp_path):
    save_state(tmp_path / "whole.safetensors", {"weights": torch.ones(100)})
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    (tmp_path / "start.safetensors").write_bytes(whole[:20])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"step": 1}))
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    for name in ("cut", "start", "empty", "pickle", "foreign"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors .*expected a Stylewright checkpoint"):
            load_state(tmp_path / f"{name}.safetensors")
    newer = {"stylewright.state": json.dumps({"dict": []}), "stylewright.state_version": "2"}
    save_file({"weight": torch.ones(2)}, tmp_path / "newer.safetensors", newer)
    with pytest.raises(
        ValueError, match=r"newer\.safetensors is a Stylewright checkpoint of version 2: expected version 1"
    ):
        load_state(tmp_path / "newer.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.safetensors"):
        load_state(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deeper" / "file.bin"
    write_atomically(path, lambda temporary: temporary.write_bytes(b"old"))

    def half(temporary):
        temporary.write_bytes(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_is_for_those_for_whom_the_users_files_are(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_state(tmp_path / "state.safetensors", {"a": torch.zeros(1)})
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "state.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
