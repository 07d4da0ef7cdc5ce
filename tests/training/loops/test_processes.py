"""Several processes train what one trains alone. Two of them do everything in one go: see ``one_of_two.py``."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import stylewright
from stylewright.training.data.dataset import Dataset
from stylewright.training.errors import IncompatibleCheckpoint
from stylewright.training.formats.state import load_state
from stylewright.training.loops.events import read_events
from stylewright.training.loops.share import share_of
from stylewright.training.processes import ALONE, Processes

WORKER = Path(__file__).with_name("one_of_two.py")
CLOSE = {"rtol": 1e-5, "atol": 1e-9}


def load(path):
    spec = importlib.util.spec_from_file_location("one_of_two", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def work():
    return load(WORKER)


@pytest.fixture(scope="module")
def two(work, tmp_path_factory):
    """The folder that two processes have worked in."""
    folder = tmp_path_factory.mktemp("two")
    work.run(ALONE, folder / "of one", steps=2, save_every=0, scheduler="constant")
    stopping = work.at_call(2, KeyboardInterrupt())
    assert work.refused(work.distilled, ALONE, folder / "whole of one", **work.WHOLE, check=stopping)
    (folder / "stylewright").symlink_to(Path(stylewright.__file__).parent)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(WORKER)]
    started = [
        subprocess.Popen([*command, str(rank), port, str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=400)[1] for process in started]
    assert (folder / "told-0.json").exists(), "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def told(two):
    """What the first process was told."""
    return json.loads((two / "told-0.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def states(two):
    return [load_state(two / f"state-{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lokr", "loha", "oft"])
@pytest.mark.parametrize("name", ["dealt out", "cut", "both"])
def test_the_gradient_is_that_of_one_process(work, states, method, name):
    """Of two steps, to 1e-5 of the largest component; and the same bits in both processes."""
    alone = work.gradients(ALONE, method, name)
    for one, first, second in zip(alone, *(state[f"{method} {name}"] for state in states), strict=True):
        assert torch.equal(first, second)
        assert (first - one).norm() <= 1e-5 * one.norm()
        assert one.norm() > 0


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lokr", "loha", "oft"])
@pytest.mark.parametrize("again", [False, True])
def test_a_model_in_parts_has_the_same_gradient(work, states, told, two, tmp_path, method, again):
    """Recomputed or not; and the same file comes out, where some methods need the frozen weights for it."""
    name = f"parts-{method}-{again}"
    folder = tmp_path / "alone"
    alone = work.gradients(ALONE, method, "both", folder=folder, gradient_checkpointing=again)
    for one, first, second in zip(alone, *(state[name] for state in states), strict=True):
        assert torch.equal(first, second)
        assert (first - one).norm() <= 1e-5 * one.norm()
    assert told[name] <= 0.6 * sum(each.numel() for each in work.TOYS.ToyDenoiser().module.parameters())
    files = [load_file(each / "adapter.safetensors") for each in (two / name, folder)]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[1].items():
        torch.testing.assert_close(files[0][key], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_of_two_learns_what_one_learns(work, states, told, two, tmp_path):
    """The same samples, levels, noise and dropped captions, through clipping, schedule and average."""
    alone = work.run(ALONE, tmp_path / "alone")
    assert told["losses"] == pytest.approx(alone.losses, rel=1e-5)
    for name, tensor in alone.adapter_state.items():
        torch.testing.assert_close(states[0]["straight"][name], tensor, rtol=1e-3, atol=1e-5)
    events, expected = (read_events(folder / "events.jsonl") for folder in (two / "straight", tmp_path / "alone"))
    assert [(e.step, e.samples) for e in events] == [(e.step, e.samples) for e in expected]
    for event, one in zip(events, expected, strict=True):
        assert [(b.low, b.samples) for b in event.loss_by_bin] == [(b.low, b.samples) for b in one.loss_by_bin]
        assert event.loss == pytest.approx(one.loss, rel=1e-5)


def test_stopped_and_continued_it_is_the_same_bit_for_bit(states):
    """Stopped by the second process alone."""
    for state in states:
        assert all(torch.equal(tensor, state["parts"][name]) for name, tensor in state["straight"].items())
        assert all(torch.equal(tensor, states[0]["straight"][name]) for name, tensor in state["straight"].items())


@pytest.mark.parametrize("name", ["dealt out", "cut"])
def test_a_student_of_two_processes_is_that_of_one(work, states, name):
    """The gradients of student and fake; the student's first is zero, for the fake is then the teacher."""
    alone = work.distilled(ALONE, None, *work.DISTILLED[name])
    first, second = (state[f"student {name}"] for state in states)
    assert len(alone["gradients"]) == 3 * (1 + 2)
    for one, ours, theirs in zip(alone["gradients"], first["gradients"], second["gradients"], strict=True):
        assert torch.equal(ours, theirs)
        assert (ours - one).norm() <= 1e-5 * one.norm()
    assert sum(one.norm() > 0 for one in alone["gradients"]) == 8
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    at_once = work.distilled(ALONE, None)
    assert (at_once["gradients"][1] - alone["gradients"][1]).norm() <= 1e-5 * at_once["gradients"][1].norm()


def test_a_stopped_student_continues_bit_for_bit(states, told):
    assert told["student"][0] == "KeyboardInterrupt"
    for state in states:
        assert all(
            torch.equal(tensor, state["student cut"]["state"][name])
            for name, tensor in state["student"]["state"].items()
        )


@pytest.mark.parametrize("name", ["dealt out", "cut"])
def test_a_student_of_all_weights_in_parts_is_that_of_one_process(work, states, two, tmp_path, name):
    """Gradients of student and fake, results, and the files."""
    alone = work.distilled(ALONE, tmp_path / "alone", *work.DISTILLED[name], **work.WHOLE)
    first, second = (state[f"whole {name}"] for state in states)
    for one, ours, theirs in zip(alone["gradients"], first["gradients"], second["gradients"], strict=True):
        assert torch.equal(ours, theirs)
        assert (ours - one).norm() <= 1e-5 * one.norm()
    assert sum(one.norm() > 0 for one in alone["gradients"]) == 8
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert not second["state"], "which is whole in one process"
    files = [load_file(folder / "student.safetensors") for folder in (two / f"whole {name}", tmp_path / "alone")]
    for found, expected in ((first["state"], alone["state"]), files):
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["start", "another"])
def test_a_student_in_parts_begins_with_another(work, states, name):
    """An adapter, which is merged into weights that no process has whole, or other weights."""
    alone = work.distilled(ALONE, None, **work.WHOLE, start=getattr(work, name)())
    begun = states[0][f"whole {name}"]
    for one, ours in zip(alone["gradients"], begun["gradients"], strict=True):
        assert (ours - one).norm() <= 1e-5 * one.norm()
    as_the_teacher = states[0]["whole cut"]["gradients"][1]
    assert (begun["gradients"][1] - as_the_teacher).norm() > 0.1 * as_the_teacher.norm(), "what the fake is shown"


def test_a_stopped_student_in_parts_continues_bit_for_bit(states, told):
    assert told["whole"][0] == "KeyboardInterrupt"
    straight = states[0]["whole cut"]["state"]
    assert all(torch.equal(tensor, straight[name]) for name, tensor in states[0]["whole"]["state"].items())


def test_parts_continue_on_one_process_and_whole_weights_in_parts(work, states, two, tmp_path):
    """With what the optimizer and the average have. Each process wrote its half, and old parts are gone."""
    on_one = work.distilled(ALONE, two / "whole stopped", **work.WHOLE)["state"]
    for name, tensor in states[0]["whole cut"]["state"].items():
        torch.testing.assert_close(on_one[name], tensor, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(states[0]["whole from one"]["state"][name], tensor, rtol=1e-3, atol=1e-5)
    shards = sorted(path.relative_to(two / "whole") for path in (two / "whole").glob("parts-*/*"))
    assert [path.parts[0] for path in shards] == ["parts-00000003"] * 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("whole lacks", "no such folder"),
        ("first lacks", "it has shard-00002-model"),
        ("last lacks", "it has shard-00001-model"),
        ("whole of another", "of another checkpoint"),
    ],
)
def test_parts_that_are_missing_or_anothers_are_named_and_nothing_is_written(work, told, two, tmp_path, name, why):
    kind, text = told[name]
    assert kind == "IncompatibleCheckpoint"
    assert "parts-00000001, a part of the checkpoint" in text and why in text
    with pytest.raises(IncompatibleCheckpoint, match=why):
        work.distilled(ALONE, two / name, **work.WHOLE)
    before, after = (two / each / "student.safetensors" for each in ("whole stopped before", name))
    assert after.read_bytes() == before.read_bytes()


def test_what_parts_cannot_do_is_named(told):
    assert told["prodigy"][0] == "ValueError"
    assert "expected one of adam, adamw, schedule-free" in told["prodigy"][1]
    assert len(told["schedule-free"]) > 0
    assert all(told["rows"])


def test_what_one_raises_all_raise(told, two):
    assert told["interrupt"] == ["KeyboardInterrupt", "by hand"]
    assert told["report"] == ["OSError", "the disk is full"]
    kind, text = told["nan"]
    assert kind == "NonFiniteLoss"
    assert text.startswith("The loss is [nan"), "and not the norm, which is nan in both of them"
    for name in ("report", "nan", "straight"):
        assert load_state(two / name / "checkpoint.safetensors", at=["learner", "processes"]) == 2


def test_one_writes(told, two):
    assert told["path"] == str(two / "straight" / "adapter.safetensors")
    assert not list(two.rglob("*.tmp"))
    assert told["words"] == [0, [0, 1]]


def test_processes_with_other_options_or_data_are_refused(told):
    assert told["options"][0] == told["data"][0] == told["uneven"][0] == "ValueError"
    assert "ema_decay is 0.5 in the first and 0.75 here; seed is 0 in the first and 1 here" in told["options"][1]
    assert "the pictures, captions or masks are others" in told["data"][1]
    assert "batch_size=3 and accumulation=1 for 2 processes" in told["uneven"][1]
    assert told["of one"][0] == "IncompatibleCheckpoint", "which the first alone has read"
    assert "scheduler was 'constant' and is 'cosine'" in told["of one"][1]


def test_where_one_dies_the_run_stops_and_continues_on_one(work, told, two, states, caplog):
    """It died in the third step, after the last checkpoint."""
    kind, text = told["lost"]
    assert kind == "LostProcess"
    assert "run it again to continue" in text
    assert load_state(two / "lost" / "checkpoint.safetensors", at=["learner", "step"]) == 4
    shutil.copytree(two / "lost", two / "again")
    continued = work.run(ALONE, two / "again")
    assert "is of a run on 2 processes, and it continues on 1" in caplog.text
    assert continued.steps_done == 6
    for name, tensor in continued.adapter_state.items():
        torch.testing.assert_close(states[0]["straight"][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "count"), [(1, 4, 4), (6, 2, 4), (8, 1, 2), (5, 3, 15), (2, 3, 1)]
)
def test_the_shares_are_all_samples_once(work, batch_size, accumulation, count):
    config = work.TOYS.toy_config(batch_size=batch_size, accumulation=accumulation)
    seen = []
    for rank in range(count):
        share = share_of(config, SimpleNamespace(rank=rank, count=count))
        seen += [(micro, row) for micro in share.passes for row in range(batch_size)[share.rows]]
        assert share.parts * share.batch_size == batch_size
        assert share.part == (() if share.parts == 1 else (rank % share.parts,))
    assert sorted(seen) == [(micro, row) for micro in range(accumulation) for row in range(batch_size)]


def test_a_model_in_parts_refuses_batches_that_take_different_passes(work):
    """Where processes have batches of their own: they would wait for each other's blocks in vain."""
    toy = work.TOYS.toy_dataset()
    data = Dataset([*toy.examples, replace(toy.examples[0], role="base")], toy.null)
    processes = Processes()
    processes.count, processes.sharded = 2, True
    with pytest.raises(ValueError, match="set accumulation to 1"):
        work.train(processes, data, batch_size=2, accumulation=2)
