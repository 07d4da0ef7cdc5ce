"""``accelerate launch``: what its configuration means here, and one command that two processes do in parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stylewright
from stylewright.training.cli.app import run
from stylewright.training.cli.launch import Launch, as_launched, launched
from stylewright.training.cli.launch import _sharding as parts_of_devices
from stylewright.training.processes import ALONE, Processes

SMALL = ["--resolution", "64", "--accumulation", "2", "--rank", "2", "--style-phrase", "<v0>", "--images", "pictures"]


def test_accelerates_precision_is_ours_where_none_is_stated(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert as_launched({"steps": 1}) == {"steps": 1}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert as_launched({}) == {"precision": "bfloat16", "gradient_checkpointing": True}
    assert as_launched({"precision": "float32"})["precision"] == "float32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="configured for fp16: expected one of bf16, no"):
        as_launched({})


def test_begun_alone_a_command_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a container, and of no launcher
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with launched() as launch:
        assert launch.processes is not None and launch.processes.count == 1
        assert launch.device_of("cpu") == "cpu"


@pytest.mark.parametrize("by_accelerate", [False, True])
def test_accelerates_user_is_told_that_only_one_process_was_begun(by_accelerate, monkeypatch, caplog):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if by_accelerate:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    caplog.set_level("INFO")
    with launched():
        assert ("works on 1 process" in caplog.text) == by_accelerate


def test_each_process_has_its_own_device():
    launch = Launch(Processes(), "cuda:1")
    assert [launch.device_of(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="'cuda:0' for 1 processes, each of which has a device of its own"):
        launch.device_of("cuda:0")
    assert Launch().processes is ALONE


def test_two_processes_in_parts_are_one(workplace, monkeypatch, capsys):
    """FSDP2 by accelerate's own flags, on the model that is shipped. One of them prints, one writes."""
    monkeypatch.undo()  # the shipped weights, as in the other processes
    package = workplace / "package"
    package.mkdir()
    (package / "stylewright").symlink_to(Path(stylewright.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [*SMALL, "--steps", "2", "--sample-every", "2", "--sample-prompts", "star", "--json"]
    launch = ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "stylewright", "train", *command, "--out", "two"]
    done = subprocess.run(
        [sys.executable, "-m", *launch], cwd=workplace, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert done.stderr.count("noise levels") == 1
    assert done.stderr.count("works on 2 processes, each of which has a part of the model") == 1
    monkeypatch.chdir(workplace)
    assert run(["train", *command, "--out", "one"]) == 0
    one, two = (workplace / name for name in ("one", "two"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()} - {"plan.json"}
    files = [load_file(folder / "adapter.safetensors") for folder in (one, two)]
    for key, tensor in files[0].items():
        torch.testing.assert_close(files[1][key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("configured", "words"),
    [({"FSDP_VERSION": "1"}, "expected fsdp_version 2"), ({"FSDP_OFFLOAD_PARAMS": "true"}, "nowhere to offload from")],
)
def test_what_cannot_be_done_in_parts_is_named(configured, words, monkeypatch):
    for name, value in ({"FSDP_VERSION": "2"} | configured).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        parts_of_devices("cpu", 2)
