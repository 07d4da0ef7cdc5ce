"""A run's folder: refusals before work, one writer, and a checkpoint that outlives a kill."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.errors import IncompatibleCheckpoint, TrainingError
from stylewright.training.formats.adapters import load_adapter
from stylewright.training.formats.state import load_state, save_state
from stylewright.training.loops import checkpoint
from stylewright.training.loops.checkpoint import RunDirectory, open_run, read_config
from stylewright.training.loops.config import TrainConfig, config_from_table


def tensors_of(folder):
    learner = load_state(folder / "checkpoint.safetensors")["learner"]
    moments = [state[name] for state in learner["optimizer"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    return [*learner["adapter"].values(), *moments, learner["losses"]]


def test_a_run_leaves_what_it_says(run_to, make_config):
    _, folder = run_to("run")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "events.jsonl", "checkpoint.safetensors", "adapter.safetensors", "run.lock"}
    assert read_config(folder) == make_config()


@pytest.mark.parametrize("method", ["lora", "dora", "styleinject"])
def test_the_adapters_file_is_the_result_and_says_what_it_is(run_to, denoiser, method):
    config = {"adapter": AdapterConfig(method=method, rank=2), "style_phrase": "dotted", "steps": 3}
    result, folder = run_to("run", **config)
    loaded = load_adapter(result.path, weights=lambda name: denoiser.module.get_submodule(name).weight)
    assert loaded.state.keys() == result.adapter_state.keys()
    for name, tensor in loaded.state.items():
        torch.testing.assert_close(tensor, result.adapter_state[name], rtol=1e-4, atol=1e-6)
    about = loaded.about
    assert (about.method, about.rank, about.targets, about.family) == (method, 2, ("style",), "toy")
    assert (about.steps, about.seed, about.images, about.style_phrase) == (3, 0, 3, "dotted")
    assert about.density["law"] == "truncated"
    assert config_from_table(about.training) == read_config(folder)


def test_what_routers_do_is_in_reports_and_in_the_file_however_often_a_run_was_stopped(run_to):
    config = {"adapter": AdapterConfig("styleinject", rank=2, branches=2), "learning_rate": 0.05}
    straight, _ = run_to("straight", steps=6, **config)
    run_to("stopped", steps=2, **config)
    stopped, _ = run_to("stopped", steps=6, **config)
    about = load_adapter(straight.path).about
    assert about.options == {"branches": 2, "injection": "f2c"}
    assert about.routing == load_adapter(stopped.path).about.routing
    layers = about.routing["layers"]
    assert layers and all(len(shares) == 2 and sum(shares) == pytest.approx(1, abs=2e-3) for shares in layers.values())
    report = straight.history[-1].routing
    assert report == {name: about.routing[name] for name in ("entropy", "spread", "largest", "one_sided")}


def test_an_adapter_lost_in_a_kill_is_written_again(run_to):
    result, _ = run_to("run")
    result.path.unlink()
    written = load_adapter(run_to("run")[0].path).state
    assert all(torch.equal(written[name], tensor) for name, tensor in result.adapter_state.items())


def test_an_adapter_that_cannot_be_written_is_known_before_work(run_to, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise ValueError("no tool reads these layers")

    seen = []
    monkeypatch.setattr(checkpoint, "save_adapter", refuse)
    with pytest.raises(ValueError, match="no tool reads these layers"):
        run_to("run", report=seen.append)
    assert not seen


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a training run"):
        read_config(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Another run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.02}, ["learning_rate was 0.01 and is 0.02"]),
        ({"adapter": AdapterConfig(rank=1)}, ["adapter.rank was 2 and is 1"]),
        ({"seed": 3, "batch_size": 4}, ["seed was 0 and is 3", "batch_size was 2 and is 4"]),
        ({"ema_decay": 0.5}, ["ema_decay was 0.0 and is 0.5"]),
    ],
)
def test_other_options_are_named(run_to, changes, words):
    _, folder = run_to("run")
    before = (folder / "checkpoint.safetensors").read_bytes(), (folder / "config.json").read_bytes()
    with pytest.raises(IncompatibleCheckpoint) as error:
        run_to("run", **changes)
    assert all(word in str(error.value) for word in words), error.value
    assert ((folder / "checkpoint.safetensors").read_bytes(), (folder / "config.json").read_bytes()) == before


def test_what_does_not_change_the_run_may_change(run_to):
    run_to("run", steps=4)
    result, folder = run_to("run", steps=6, save_every=1, report_every=1, sample_every=2, sample_prompts=("a cat",))
    assert result.steps_done == 6
    assert read_config(folder).save_every == 1


def test_a_checkpoint_from_before_an_option_was_there_has_its_default(run_to):
    _, folder = run_to("run", steps=4)
    saved = load_state(folder / "checkpoint.safetensors")
    del saved["config"]["offset_noise"]
    save_state(folder / "checkpoint.safetensors", saved)
    with pytest.raises(IncompatibleCheckpoint, match=r"offset_noise was 0\.0 and is 0\.1"):
        run_to("run", steps=5, offset_noise=0.1)
    assert run_to("run", steps=5)[0].steps_done == 5


def test_a_schedule_that_ends_with_the_run_cannot_be_extended(run_to):
    run_to("run", steps=4, scheduler="cosine")
    with pytest.raises(IncompatibleCheckpoint, match="steps was 4 and is 8"):
        run_to("run", steps=8, scheduler="cosine")


def test_fewer_steps_than_were_done_are_refused(run_to):
    run_to("run", steps=4)
    with pytest.raises(IncompatibleCheckpoint, match=r"4 steps already, more than steps=3"):
        run_to("run", steps=3)


def test_other_data_and_another_model_are_named(run_to, make_dataset, denoiser):
    run_to("run", steps=2)
    with pytest.raises(IncompatibleCheckpoint, match=r"data\.pictures was 3 and is 2; the pictures, captions or masks"):
        run_to("run", data=make_dataset(2))
    denoiser.process = "vp"
    with pytest.raises(IncompatibleCheckpoint, match=r"model\.process was 'flow' and is 'vp'"):
        run_to("run", on=denoiser)


def test_a_model_with_other_layers_is_refused(run_to, denoiser):
    run_to("run", steps=2)
    denoiser.module.blocks.append(denoiser.module.blocks[0])
    denoiser.module.blocks.append(type(denoiser.module.blocks[0])().requires_grad_(False))
    with pytest.raises(IncompatibleCheckpoint, match="another model"):
        run_to("run", on=denoiser)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_checkpoint_is_named_and_left_alone(run_to, damage):
    _, folder = run_to("run")
    file = folder / "checkpoint.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    damaged = file.read_bytes()
    with pytest.raises(IncompatibleCheckpoint, match=r"checkpoint\.safetensors cannot be read"):
        run_to("run")
    assert file.read_bytes() == damaged


def test_what_a_checkpoint_says_is_read_from_its_header(run_to, monkeypatch):
    result, folder = run_to("run", steps=4)
    stored = RunDirectory(folder).stored()
    assert (stored.step, stored.continuable, stored.identity["data"]["pictures"]) == (4, True, 3)
    assert config_from_table(stored.config) == read_config(folder)
    assert RunDirectory(folder).losses() == result.losses
    assert RunDirectory(folder.with_name("none")).stored() is None


def test_a_run_without_its_state_keeps_its_result(run_to):
    result, folder = run_to("run", steps=4)
    run = RunDirectory(folder)
    run.forget_state()
    stored = run.stored()
    assert (stored.step, stored.continuable) == (4, False)
    assert run.losses() == result.losses and not run.adapter.exists()
    with pytest.raises(IncompatibleCheckpoint, match="no longer what it takes to continue"):
        run_to("run", steps=5)


def test_an_open_folder_is_trained_in(tmp_path, run_to, make_config, dataset, denoiser):
    from stylewright.training.loops.train import train

    straight, _ = run_to("straight")
    with open_run(tmp_path / "open") as run:
        result = train(denoiser, dataset, make_config(), run_dir=run)
        with pytest.raises(TrainingError, match="Another process is training"):
            run_to("open", steps=9)
    assert result.losses == straight.losses and result.path == run.adapter


def test_another_identity_than_ours_decides(run_to, make_dataset, denoiser, make_config, tmp_path):
    from stylewright.training.loops.train import train

    def go(**identity):
        return train(denoiser, make_dataset(), make_config(), run_dir=tmp_path / "run", identity=identity)

    go(weights="a")
    with pytest.raises(IncompatibleCheckpoint, match="weights was 'a' and is 'b'"):
        go(weights="b")


# --------------------------------------------------------------------------------------------------------------------
# Folders and disks


def test_only_one_may_write(run_to, tmp_path):
    with open_run(tmp_path / "run"), pytest.raises(TrainingError, match="Another process is training in"):
        run_to("run")
    assert run_to("run")[0].steps_done == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_known_before_work(run_to, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="Cannot write into"):
        run_to("run")


def test_a_folder_that_is_a_file_is_known_before_work(run_to, tmp_path):
    (tmp_path / "run").write_text("something else")
    with pytest.raises(ValueError, match=r"Cannot write into .*run.*Choose another folder"):
        run_to("run")
    assert (tmp_path / "run").read_text() == "something else"


def test_a_full_disk_is_known_before_work(run_to, monkeypatch, tmp_path):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 2**20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="has 1 MiB free and the checkpoints of this run need up to 16 MiB"):
        run_to("run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(run_to, monkeypatch, tmp_path):
    straight, folder = run_to("straight")
    save = checkpoint.save_state

    def full_after_step_three(path, state):
        if state["learner"]["step"] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, state)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"No space left.*checkpoint is intact"):
        patch.setattr(checkpoint, "save_state", full_after_step_three)
        run_to("full")
    assert load_state(tmp_path / "full" / "checkpoint.safetensors")["learner"]["step"] == 3
    assert not list((tmp_path / "full").glob(".*.tmp"))
    again, _ = run_to("full")
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(folder), tensors_of(tmp_path / "full"), strict=True))
    assert again.losses == straight.losses


def test_a_folder_that_is_deleted_under_way_is_made_again(run_to, tmp_path):
    def delete(event):
        if event.step == 4:
            shutil.rmtree(tmp_path / "run")

    result, folder = run_to("run", report=delete)
    assert result.path.exists() and RunDirectory(folder).stored().step == 8


def test_a_log_that_cannot_be_written_says_that_nothing_is_lost(run_to, tmp_path):
    def block(event):
        (tmp_path / "run" / "events.jsonl").unlink()
        (tmp_path / "run" / "events.jsonl").mkdir()

    with pytest.raises(TrainingError, match=r"Cannot write .*events\.jsonl.*can be continued"):
        run_to("run", report=block)


def test_a_disk_that_is_full_before_the_first_checkpoint_says_what_to_do(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_state", full)
    with (
        open_run(tmp_path / "run") as run,
        pytest.raises(TrainingError, match=r"No space left.* no checkpoint yet.* has room .*begin again"),
    ):
        run.save({}, TrainConfig(), {})


# --------------------------------------------------------------------------------------------------------------------
# kill -9

CHILD = """
import importlib.util, sys
from pathlib import Path

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

load("stylewright", Path(sys.argv[1]) / "__init__.py")
toy = load("toy", sys.argv[2])
from stylewright.training.loops.train import train
train(toy.ToyDenoiser(), toy.toy_dataset(), toy.toy_config(steps=100_000, save_every=1), run_dir=Path(sys.argv[3]))
"""


def killed_after(repository: Path, folder: Path, seconds: float) -> int:
    """Trains in another process, kills it so long after its first save, and returns the checkpoint's step."""
    before = step_of(folder)
    toy = Path(__file__).with_name("conftest.py")
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(repository), str(toy), str(folder)])
    try:
        deadline = time.monotonic() + 300
        while step_of(folder) <= before:
            assert child.poll() is None and time.monotonic() < deadline, "the child did not train"
            time.sleep(0.02)
        time.sleep(seconds)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    return step_of(folder)


def step_of(folder: Path) -> int:
    """Step of the checkpoint, which at any moment can be read; 0 where there is none."""
    file = folder / "checkpoint.safetensors"
    return load_state(file)["learner"]["step"] if file.exists() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_run_killed_twice_equals_a_straight_one(run_to, repository, tmp_path):
    """Saving at every step, so that most moments are in the middle of a save."""
    first = killed_after(repository, tmp_path / "killed", 0.0371)
    second = killed_after(repository, tmp_path / "killed", 0.2113)
    assert 0 < first < second
    steps = second + 5
    straight, folder = run_to("straight", steps=steps, save_every=0)
    again, _ = run_to("killed", steps=steps)
    assert torch.equal(torch.tensor(again.losses), torch.tensor(straight.losses))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(folder), tensors_of(tmp_path / "killed"), strict=True))
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    reported = [json.loads(line)["step"] for line in (tmp_path / "killed" / "events.jsonl").read_text().splitlines()]
    assert reported == sorted(set(reported))
    assert reported[-1] == steps


def test_a_file_in_the_place_of_a_run_s_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("no folder")
    for path in (tmp_path / "run", tmp_path / "run" / "inner"):
        with pytest.raises(ValueError, match=r"run is a file\. Choose another folder"), open_run(path):
            pass


def test_a_run_needs_no_more_room_for_what_it_replaces(run_to, monkeypatch):
    _, folder = run_to("run")
    held = sum((folder / name).stat().st_size for name in ("checkpoint.safetensors", "adapter.safetensors"))
    run = RunDirectory(folder)
    for free, enough in ((held - 1, False), (held, True)):
        usage = shutil._ntuple_diskusage(10**9, 10**9, checkpoint.SPARE_BYTES + 12 * held - 2 * held + free)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path, usage=usage: usage)
        if enough:
            run.require_space(held)
        else:
            with pytest.raises(ValueError, match="make room, choose another folder or so"):
                run.require_space(held, " or so")
