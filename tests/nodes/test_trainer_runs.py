"""A run inside ComfyUI, stopped anywhere, changed, continued, and found again: on a FLUX of two blocks."""

import logging
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

pytestmark = pytest.mark.comfy

SIDE = 32  # pixels
STRAIGHT = {}  # ends of straight runs, each trained once


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """models/loras and output of ComfyUI, empty."""
    import folder_paths

    loras, output = tmp_path / "loras", tmp_path / "output"
    loras.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    return loras, output / "stylewright"


def items(count=3, caption="a star"):
    from stylewright.training.data.items import items_from_memory

    pictures = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return items_from_memory(pictures, [f"{caption} {number}" for number in range(count)])


def config(**changes):
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.loops.config import TrainConfig

    plain = {
        "steps": 4, "batch_size": 1, "accumulation": 2, "learning_rate": 1e-2, "resolution": SIDE, "save_every": 2,
        "style_phrase": "inked", "adapter": AdapterConfig(rank=2),
    }  # fmt: skip
    return TrainConfig(**plain | changes)


@pytest.fixture
def train(tiny, tiny_clip, embedded, folders):
    """``train(steps=4, …)`` queues the node: its result. ``on``: sockets other than fresh ones, as after a restart."""
    from stylewright.nodes.bridge.sampling import Brush
    from stylewright.nodes.bridge.training import Job, Sockets, train_adapter

    def run(*, on=None, pictures=None, name="mine", **changes):
        ours = ("resume", "save_intermediate", "keep_checkpoints")
        job = {key: changes.pop(key) for key in ours if key in changes}
        sockets = on or Sockets(tiny("flux"), tiny_clip("flux"), embedded.vae)
        asked = Job(pictures or items(), "content", config(**changes), name, Brush(steps=2), **job)
        with torch.inference_mode():
            return train_adapter(sockets, asked)

    run.sockets = lambda: Sockets(tiny("flux"), tiny_clip("flux"), embedded.vae)
    return run


def state_of(trained):
    """All that a run leaves and goes on from, bit for bit: the adapter's file, the losses and the learner's state."""
    from stylewright.training.formats.contents import read_adapter
    from stylewright.training.formats.state import load_state

    learner = load_state(trained.run / "checkpoint.safetensors")["learner"]
    del learner["seconds"]
    file = read_adapter(trained.path)  # whose header is in another order each time: safetensors shuffles it
    return End(trained.losses, dict(file.header), _numbers(dict(file.tensors)), _numbers(learner))


@dataclass(frozen=True)
class End:
    losses: list
    header: dict
    adapter: dict
    learner: dict


def _numbers(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    return [_numbers(part) for part in value] if isinstance(value, list | tuple) else value


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))


def leftovers(folders):
    return [path for folder in folders for path in folder.rglob(".*.tmp")]


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(n)`` presses ComfyUI's cancel at the n-th moment when anything looks for it; the list of moments."""
    import comfy.model_management as management

    look, moments = management.throw_exception_if_processing_interrupted, []

    def counted():
        moments.append(None)
        if len(moments) == counted.at:
            management.interrupt_current_processing()
        look()

    def press(at):
        moments.clear()
        counted.at = at
        return moments

    counted.at = None
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", counted)
    yield press
    management.interrupt_current_processing(False)


@pytest.fixture
def straight(train, interrupt):
    """``straight(steps=4, …)``: what a run that is never stopped ends as, and how often it looks for a cancel."""

    def end_of(**changes):
        if repr(changes) not in STRAIGHT:
            moments = interrupt(None)
            STRAIGHT[repr(changes)] = state_of(train(name="straight", resume="begin anew", **changes)), len(moments)
        return STRAIGHT[repr(changes)]

    return end_of


@pytest.fixture
def stopped(train, straight, interrupt):
    """``stopped()``: the run "mine", cancelled in the middle; the end of a straight one."""
    import comfy.model_management as management

    def stop():
        end, moments = straight()
        interrupt(moments * 3 // 4)
        with pytest.raises(management.InterruptProcessingException):
            train()
        interrupt(None)
        return end

    return stop


# --------------------------------------------------------------------------------------------------------------------
# Stopped and continued


@pytest.mark.parametrize("seed", range(4))
def test_cancelled_anywhere_and_continued_equals_a_straight_run(seed, train, folders, straight, interrupt):
    """While encoding, in a layer of the model, forward or recomputed, between batches, while drawing samples."""
    import comfy.model_management as management

    sampled = {"sample_prompts": ("a house",), "sample_every": 2, "gradient_checkpointing": True}
    end, moments = straight(**sampled)
    draw, sockets = random.Random(seed), train.sockets()
    weights = [parameter.clone() for parameter in sockets.model.model.parameters()]
    for _ in range(2):
        interrupt(draw.randint(1, moments))
        try:
            train(on=sockets, name="stopped", **sampled)
        except management.InterruptProcessingException:
            assert not management.in_training
        assert all(torch.equal(a, b) for a, b in zip(weights, sockets.model.model.parameters(), strict=True))
        assert not leftovers(folders)
    interrupt(None)
    assert state_of(train(name="stopped", **sampled)) == end


def test_a_cancel_takes_effect_within_one_batch(train, folders, monkeypatch, interrupt):
    """Also on a model whose layers never look for it."""
    import comfy.model_management as management
    import comfy.ops

    from stylewright.training.loops import train as loop

    monkeypatch.setattr(comfy.ops, "run_every_op", lambda: None)
    batches, learn_from = [], loop.learn_from

    def cancelled(*given):
        batches.append(None)
        if len(batches) == 4:  # the first batch of the second step, of three
            management.interrupt_current_processing()
        return learn_from(*given)

    monkeypatch.setattr(loop, "learn_from", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        train(accumulation=3)
    assert len(batches) == 4
    assert names(folders[0]) == ["mine_00001_step000001.safetensors"]


def test_more_steps_go_on_where_the_run_ended(train, folders, straight):
    train(steps=2)
    assert state_of(train(resume="continue")) == straight()[0]
    assert [name for name in names(folders[0]) if "straight" not in name] == [
        "mine_00001_.safetensors",
        "mine_00001_step000004.safetensors",
    ]


def test_what_is_free_may_change_in_the_middle(train, stopped):
    end = stopped()
    changed = {"sample_prompts": ("a tree",), "sample_every": 3, "save_every": 1, "gradient_checkpointing": True}
    continued = train(resume="continue", keep_checkpoints=9, save_intermediate=True, **changed)
    assert continued.losses == end.losses
    assert {key: tensor.tolist() for key, tensor in continued.tensors.items()} == {
        key: numbers for key, (_, numbers) in end.adapter.items()
    }


def test_encoders_that_answer_otherwise_the_next_time_change_nothing(train, stopped, monkeypatch):
    """A VAE in tiles, a text encoder on the CPU: what the run was begun with is kept."""
    end = stopped()
    sockets = train.sockets()
    encode, tokens = sockets.vae.encode, sockets.clip.encode_from_tokens_scheduled
    monkeypatch.setattr(sockets.vae, "encode", lambda pixels: encode(pixels) + 1e-3)

    def other(*args, **options):
        ((context, rest),) = tokens(*args, **options)
        return [[context + 1e-3, rest]]

    sockets.clip.encode_from_tokens_scheduled = other
    assert state_of(train(on=sockets, resume="continue")) == end


# --------------------------------------------------------------------------------------------------------------------
# Which run


def with_lora_below(sockets):
    """The model with a patch on one of its weights."""
    model = sockets.model.clone()
    key = "diffusion_model.img_in.weight"
    model.add_patches({key: ("diff", (torch.ones_like(model.model.get_parameter(key)),))}, 0.5)
    return replace(sockets, model=model)


def with_blocks_scaled(sockets, strength):
    """The model with a function of another node in its blocks."""

    def scale(out, extra_options):
        return {**out, "img": out["img"] * strength}

    model = sockets.model.clone()
    model.set_model_patch(lambda arguments: scale(arguments, {}), "double_block")
    return replace(sockets, model=model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.02, "seed": 5}, ["learning_rate was 0.01 and is 0.02", "seed was 0 and is 5"]),
        ({"pictures": "other"}, ["the pictures, captions or masks are others", "data.pictures was 3 and is 2"]),
        ({"on": "patched"}, ["the model's weights, or the LoRAs and patches on it, are others"]),
        ({"on": "altered"}, ["what other nodes changed of how the model computes (FreeU, attention patches, …)"]),
        ({"on": "other clip"}, ["the text encoder is another"]),
        ({"steps": 1}, ["it has 2 steps already, and steps is 1"]),
        ({"scheduler": "cosine"}, ["scheduler was 'constant' and is 'cosine'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_forbids_to_continue_is_named(changes, words, train, folders, caplog):
    from stylewright.training.errors import TrainingError

    others = {
        "other": items(2),
        "patched": with_lora_below(train.sockets()),
        "altered": with_blocks_scaled(train.sockets(), 0.9),
        "other clip": replace(train.sockets(), clip=replaced_clip(train.sockets().clip)),
    }
    changes = {key: others.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    train(steps=2)
    with pytest.raises(TrainingError, match="mine_00001 cannot be continued exactly") as refused:
        train(**{"steps": 2, "resume": "continue", **changes})
    assert all(word in str(refused.value) for word in words), refused.value
    assert names(folders[0]) == ["mine_00001_.safetensors"] and len(list(folders[1].iterdir())) == 1
    caplog.set_level(logging.INFO)
    assert train(**{"steps": 2, **changes}).path.name == "mine_00002_.safetensors"
    assert all(word in caplog.text for word in words)
    assert "mine_00001 is not continued" in caplog.text
    assert train(steps=2).path.name == "mine_00001_.safetensors"  # the first run is found again


def replaced_clip(clip):
    clip.layer_idx = -2
    return clip


def test_a_schedule_over_the_steps_is_no_run_of_more_steps(train):
    train(steps=2, scheduler="cosine")
    from stylewright.training.errors import IncompatibleCheckpoint

    with pytest.raises(IncompatibleCheckpoint, match="steps was 2 and is 4"):
        train(steps=4, scheduler="cosine", resume="continue")
    assert train(steps=4, scheduler="cosine").path.name == "mine_00002_.safetensors"


def test_a_loaded_and_patched_model_is_the_same_model(train):
    """ComfyUI writes patches into the weights, of whichever clone was used last."""
    from stylewright.nodes.bridge.identity import digest_of_model
    from stylewright.nodes.bridge.session import training_session

    sockets = train.sockets()
    patched = with_lora_below(sockets)
    plain, changed = digest_of_model(sockets.model), digest_of_model(patched.model)
    assert plain != changed
    with torch.inference_mode(), training_session(patched.model):
        assert (digest_of_model(sockets.model), digest_of_model(patched.model)) == (plain, changed)
    assert digest_of_model(train.sockets().model) == plain


def test_a_run_on_a_model_with_functions_goes_on_until_their_strength_changes(train):
    from stylewright.training.errors import TrainingError

    train(steps=2, on=with_blocks_scaled(train.sockets(), 0.9))
    again = train(steps=3, resume="continue", on=with_blocks_scaled(train.sockets(), 0.9))
    assert again.run.name == "mine_00001"
    with pytest.raises(TrainingError, match="attention patches, …"):
        train(steps=4, resume="continue", on=with_blocks_scaled(train.sockets(), 0.8))


def test_a_finished_run_is_given_back_after_a_restart(train, folders, monkeypatch):
    from stylewright.nodes.bridge import training

    first = train(steps=1)
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: pytest.fail("it was trained"))
    again = train(steps=1)
    assert (again.path, again.losses, again.run) == (first.path, first.losses, first.run)
    assert all(torch.equal(again.tensors[key], first.tensors[key]) for key in first.tensors)
    first.path.unlink()
    assert train(steps=1).path == first.path and first.path.exists(), "a deleted file is there again"


def test_begin_anew_and_two_trainers_of_one_file_name(train, folders):
    first, second = train(steps=1), train(steps=1, resume="begin anew")
    assert (first.path.name, second.path.name) == ("mine_00001_.safetensors", "mine_00002_.safetensors")
    other = train(steps=1, seed=1)
    assert train(steps=1, seed=1).path == other.path
    assert train(steps=2, seed=1).path.name == "mine_00003_step000002.safetensors"


def test_a_deleted_run_begins_anew_beside_its_adapters(train, folders):
    first = train(steps=1)
    kept = first.path.read_bytes()
    shutil.rmtree(folders[1])
    assert train(steps=1).path.name == "mine_00002_.safetensors"
    assert first.path.read_bytes() == kept


def test_only_the_newest_finished_runs_keep_their_checkpoints(train, folders, caplog):
    from stylewright.training.errors import TrainingError

    caplog.set_level(logging.INFO)
    first = train(steps=1, keep_checkpoints=1)
    size = (first.run / "checkpoint.safetensors").stat().st_size
    train(steps=1, name="another", keep_checkpoints=1)
    assert (first.run / "checkpoint.safetensors").stat().st_size == size  # each file name has its own
    train(steps=1, seed=1, keep_checkpoints=1)
    assert (first.run / "checkpoint.safetensors").stat().st_size < size / 2
    assert not (first.run / "adapter.safetensors").exists() and not (first.run / "encoded").exists()
    with pytest.raises(TrainingError, match=r"mine_00001.*its checkpoint is gone.*Set resume"):  # not the later one
        train(steps=2, resume="continue")
    again = train(steps=1)
    assert (again.path, again.losses) == (first.path, first.losses)
    with pytest.raises(TrainingError, match="its checkpoint is gone"):
        train(steps=2, resume="continue")
    first.path.unlink()
    assert train(steps=1).path.name == "mine_00003_.safetensors"
    assert "its checkpoint is gone" in caplog.text


def test_interrupted_runs_keep_their_checkpoints(train, stopped):
    end = stopped()
    train(seed=1, steps=1, keep_checkpoints=0)
    assert state_of(train(resume="continue")) == end


def test_nothing_to_continue_is_said(train, folders):
    from stylewright.training.errors import TrainingError

    with pytest.raises(TrainingError, match="no run of the file name 'mine' to continue"):
        train(resume="continue")
    with pytest.raises(TrainingError, match="has learned anything yet"):
        train(resume="use as it is")
    with pytest.raises(ValueError, match="expected one of automatic, continue, begin anew, use as it is"):
        train(resume="maybe")
    assert not names(folders[0]) and not folders[1].exists()


# --------------------------------------------------------------------------------------------------------------------
# As it is


def test_a_cancelled_run_can_be_looked_at(train, folders, stopped, monkeypatch):
    from stylewright.nodes.bridge import training
    from stylewright.nodes.trainer import StyleFriendlySNRTrainer

    def seen():
        return StyleFriendlySNRTrainer.fingerprint_inputs(resume="use as it is", file_name="mine")

    end, before = stopped(), seen()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *args, **kwargs: pytest.fail("it was trained"))
        partial = train(resume="use as it is")
    done = len(partial.losses)
    assert 0 < done < 4 and partial.losses == end.losses[:done]
    assert partial.path.name == f"mine_00001_step{done:06}.safetensors"
    assert any(float(tensor.abs().max()) > 0 for key, tensor in partial.tensors.items() if "lora_B" in key)
    assert seen() == before, "the same is cached"
    assert state_of(train()) == end
    assert seen() != before, "a run that went on is looked at again"
    assert train(resume="use as it is", seed=7).losses == end.losses  # there is none of this seed: the last one


def test_an_adapter_that_was_deleted_is_published_again(train):
    from stylewright.nodes.trainer import StyleFriendlySNRTrainer

    def fingerprint():  # by which ComfyUI's cache knows whether its result still holds
        return StyleFriendlySNRTrainer.fingerprint_inputs(resume="automatic", file_name="mine")

    before = fingerprint()
    first = train(steps=1)
    assert fingerprint() == before
    kept = first.path.read_bytes()
    first.path.unlink()
    assert fingerprint() != before
    assert train(steps=1).path.read_bytes() == kept
    assert fingerprint() == before


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_intermediate_adapters(train, folders):
    import folder_paths

    assert folder_paths.get_filename_list("loras") == []
    train(steps=5, save_every=2, save_intermediate=True, name="styles/mine")
    found = [f"styles/mine_00001_{end}.safetensors" for end in ("", "step000002", "step000004")]
    assert sorted(folder_paths.get_filename_list("loras")) == found
    from stylewright.training.formats.contents import read_about

    assert [read_about(folders[0] / name).steps for name in found] == [5, 2, 4]


def test_files_of_others_are_never_overwritten(train, folders):
    for end in ("", "step000003"):
        (folders[0] / f"mine_00001_{end}.safetensors").write_bytes(b"somebody's")
    train(steps=3, save_every=2, save_intermediate=True)
    (folders[0] / "mine_00002_step000004.safetensors").write_bytes(b"somebody's")
    assert train(steps=4).path.name == "mine_00002_step000004_2.safetensors"
    assert names(folders[0]) == [
        "mine_00001_.safetensors",
        "mine_00001_step000003.safetensors",
        "mine_00002_.safetensors",
        "mine_00002_step000002.safetensors",
        "mine_00002_step000004.safetensors",
        "mine_00002_step000004_2.safetensors",
    ]
    assert (folders[0] / "mine_00001_.safetensors").read_bytes() == b"somebody's"


def test_what_a_kill_left_half_copied_is_removed(train, folders):
    train(steps=2)
    ours, foreign = folders[0] / ".mine_00001_.safetensors.123.tmp", folders[0] / ".other_00001_.safetensors.123.tmp"
    run = folders[1] / "mine_00001"
    for folder in (run, run / "samples", run / "encoded"):
        folder.mkdir(exist_ok=True)
        (folder / ".file.safetensors.123.tmp").write_bytes(b"half")
    for path in (ours, foreign):
        path.write_bytes(b"half")
    train(steps=3)
    assert leftovers(folders) == [foreign]


def test_a_kill_before_the_first_checkpoint_leaves_no_trace(train, folders):
    (folders[1] / "mine_00001").mkdir(parents=True)
    (folders[1] / "mine_00001" / "run.json").write_text('{"version": 1, "pattern": "mine", "adapter": "mine_00001"}')
    (folders[1] / "mine_00001" / ".checkpoint.safetensors.123.tmp").write_bytes(b"half")
    (folders[1] / "other_00001").mkdir()
    (folders[1] / "other_00001" / "letter.txt").write_text("somebody's")
    assert train(steps=1).path.name == "mine_00001_.safetensors"
    assert train(steps=1, name="other").path.name == "other_00002_.safetensors"
    assert not leftovers(folders)


def test_a_disk_that_is_full_loses_nothing(train, folders, monkeypatch, straight, stopped):
    """The adapter so far cannot be published: the interrupt is what is raised, and the run goes on later."""
    import errno

    from stylewright.nodes.bridge import publishing

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    straight()
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "copy", full)
        end = stopped()
    assert not [name for name in names(folders[0]) if "mine" in name] and not leftovers(folders)
    assert state_of(train()) == end


def test_a_run_of_another_process_is_left_alone(train, folders):
    from stylewright.training.errors import TrainingError

    run = train(steps=2).run
    hold = "import sys, filelock; held = filelock.FileLock(sys.argv[1]).acquire(); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run / "run.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="Another process is training in"):
            train(steps=3)
        assert train(steps=2).run == run, "to be read it need not be free"
        other.communicate("\n")
    assert len(train(steps=3).losses) == 3


def test_unreadable_runs_are_passed_over(train, folders, caplog):
    from stylewright.training.errors import TrainingError

    first = train(steps=2)
    (first.run / "checkpoint.safetensors").write_bytes(b"damaged")
    (folders[1] / "foreign").mkdir()
    (folders[1] / "foreign" / "run.json").write_text("no json")
    with pytest.raises(TrainingError, match=r"cannot be read as the checkpoint.*Its adapter is still .*adapter\.safet"):
        train(steps=2, resume="continue")
    caplog.set_level(logging.INFO)
    assert train(steps=2).path.name == "mine_00002_.safetensors"
    assert "A new run begins" in caplog.text and "cannot be read as the checkpoint" in caplog.text
    assert "cannot be read as the record of a run" in caplog.text
    assert (first.run / "checkpoint.safetensors").read_bytes() == b"damaged"


def test_a_damaged_record_is_said_and_nothing_of_its_run_touched(train, caplog):
    caplog.set_level(logging.INFO)
    first = train(steps=1)
    (first.run / "run.json").write_text("{")
    checkpoint = (first.run / "checkpoint.safetensors").read_bytes()
    second = train(steps=1)
    assert second.run != first.run and second.path != first.path
    assert "mine_00001/run.json cannot be read as the record of a run" in caplog.text
    assert "A new run begins" in caplog.text
    assert (first.run / "checkpoint.safetensors").read_bytes() == checkpoint
