"""The distiller node on the embedded model: its student, its file, and what it leaves as it was."""

import math

import pytest
import torch
from training_runs import memory

pytestmark = pytest.mark.comfy

PROMPTS = "{tree|star} in {ocean|jazz} style\n# a remark\nhouse"
FIRST = []  # the student that other tests begin with


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """models/loras and output of ComfyUI, empty."""
    import folder_paths

    loras, output = tmp_path / "loras", tmp_path / "output"
    loras.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    return loras, output / "stylewright"


@pytest.fixture
def distil(embedded, folders):
    """``distil(steps=2, …)`` queues the node: its outputs. ``on``: sockets other than the embedded model's."""
    from stylewright.nodes.distiller import PGSBDistiller

    class Node(PGSBDistiller):
        """With the hidden inputs that an executor would set."""

    Node.hidden = type("Hidden", (), {"unique_id": None})
    inputs = PGSBDistiller.define_schema().inputs
    defaults = {each.id: each.default for each in inputs if getattr(each, "default", None) is not None}
    small = {
        "prompts": PROMPTS, "steps": 2, "batch_size": 2, "rank": 4, "fake_rank": 3, "resolution": 32, "save_every": 2,
        "learning_rate": 1e-3, "sample_steps": 2, "file_name": "mine", "target_patterns": r"img_attn\.qkv",
    }  # fmt: skip

    def run(**changes):
        sockets = {"teacher": embedded.model, "clip": embedded.clip, "vae": embedded.vae}
        with torch.inference_mode():
            return Node.execute(**sockets | defaults | small | changes).args

    return run


@pytest.fixture
def first(distil):
    """A student, distilled once."""
    if not FIRST:
        FIRST.append(distil(ema_decay=0.0, file_name="first")[0])
    return FIRST[0]


def test_a_student_comes_out_and_sets_the_sampler_up(distil, embedded):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter
    from stylewright.nodes.bridge.students import preset_of

    places, before = memory(embedded.model)
    lora, losses, path, samples = distil(steps=4, sample_prompt="tree", sample_every=2, target_patterns="")
    assert lora.file.about.one_step == {"level": 1.0, "unit": "sigma", "prediction": "flow", "start": "unit"}
    assert len(losses["loss"]) == 4 and path.endswith("mine_00001_.safetensors")
    assert samples.shape[0] == 1 and samples.shape[2] > 3 * 32  # the teacher's, and the student's after 2 and 4 steps
    student = apply_adapter(embedded.model, None, lora, Strengths(), warn=print)
    assert not student.homeless and preset_of(student.model).levels(1) == (1.0,)
    after = memory(embedded.model)
    assert after[0] == places and all(torch.equal(after[1][name], value) for name, value in before.items())


def test_a_run_is_given_back_and_goes_on_and_is_no_trainers(distil, folders):
    lora, losses, path, _ = distil(steps=2)
    again, _, same, _ = distil(steps=2)
    assert same == path and all(torch.equal(again[name], tensor) for name, tensor in lora.items())
    longer, losses, *_ = distil(steps=4)
    straight, *_ = distil(steps=4, resume="begin anew")
    assert len(losses["loss"]) == 4 and all(torch.equal(longer[name], tensor) for name, tensor in straight.items())
    from stylewright.nodes.bridge.runs import runs_of
    from stylewright.training.loops.distil_config import DistilConfig

    assert not runs_of("mine") and len(runs_of("mine", DistilConfig)) == 2


def with_lora(model, lora, strength=1.0):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter

    return apply_adapter(model, None, lora, Strengths(strength), warn=print).model


def effect(lora):
    """What an adapter adds to the weight of each of its layers."""
    layers = lora.file.layers.items()
    found = {name: layer.tensors["B"] @ layer.tensors["A"] * layer.scale for name, layer in layers}
    assert found and all(value.abs().max() > 0 for value in found.values())
    return found


@pytest.mark.parametrize("loader", ["ours", "stock"])
def test_a_student_is_where_the_run_begins(loader, first, distil, embedded):
    import comfy.sd

    if loader == "ours":
        student, strength = with_lora(embedded.model, first, 0.5), 0.5
    else:
        student, strength = comfy.sd.load_lora_for_models(embedded.model, None, dict(first), 1.0, 0.0)[0], 1.0
    second, *_ = distil(student=student, rank=6, learning_rate=1e-12, steps=1, ema_decay=0.0, file_name="second")
    assert second.file.about.started_from == "the linked student's LoRAs" and second.file.about.rank == 6
    before, after = effect(first), effect(second)
    assert before.keys() == after.keys()
    for name, change in before.items():
        assert torch.allclose(after[name], strength * change, atol=1e-7 + 1e-5 * float(change.abs().max()))


def test_the_teachers_loras_are_in_the_students_file(first, distil, embedded):
    import comfy.sd

    style, *_ = distil(ema_decay=0.0, file_name="style", seed=5)
    teacher = comfy.sd.load_lora_for_models(embedded.model, None, dict(style), 1.0, 0.0)[0]  # which tells no student
    short = {"learning_rate": 1e-12, "steps": 1, "ema_decay": 0.0}
    lora, *_ = distil(teacher=teacher, file_name="of_style", **short)
    before, after = effect(style), effect(lora)
    assert all(torch.allclose(after[name], change, atol=1e-6) for name, change in before.items())
    lora, *_ = distil(teacher=teacher, student=with_lora(teacher, first), rank=8, file_name="both", **short)
    more, after = effect(first), effect(lora)
    assert all(torch.allclose(after[name], change + more[name], atol=1e-6) for name, change in before.items())


def test_a_student_of_another_time_is_refused(distil, embedded, folders):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter

    early, *_ = distil(steps=1, time=0.4)
    student = apply_adapter(embedded.model, None, early, Strengths(), warn=print).model
    with pytest.raises(ValueError, match=r"level is 0\.4, and with time=1 this run's is 1"):
        distil(student=student, file_name="other")
    assert not list(folders[0].glob("other*"))
    distil(student=student, file_name="other", steps=1, time=0.4)


def test_a_teacher_with_other_patches_keeps_them_and_says_so(distil, embedded):
    from stylewright.nodes.bridge.student_start import undressed
    from stylewright.training.adapters.methods import AdapterConfig

    model, key = embedded.model.clone(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    model.add_patches({key: ("diff", (torch.full((768, 256), 1e-2),))})
    base, worn, note = undressed(model, AdapterConfig())
    assert base is model and worn is None and "'diff' on diffusion_model.double_blocks.0" in note
    plain, patched = distil()[0], distil(teacher=model, file_name="patched")[0]
    assert any(not torch.equal(patched[name], tensor) for name, tensor in plain.items())


def test_prompts_that_are_too_many_to_keep_give_the_same_student(distil, monkeypatch):
    from stylewright.nodes.bridge import distil_prompts, distilling

    lora, *_ = distil(negatives="circle\nheart")
    for module in (distil_prompts, distilling):
        monkeypatch.setattr(module, "MOST", 2)
    asked, *_ = distil(negatives="circle\nheart", resume="begin anew")
    assert all(torch.equal(asked[name], tensor) for name, tensor in lora.items())


def test_prompts_of_a_file(distil, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "mine.txt").write_text("tree\n# a remark\n{star|house}\n")
    lora, *_ = distil(prompts="", prompt_file="mine.txt")
    assert lora.file.about.steps == 2
    for name in ("nothing.txt", "../secret.txt", str(tmp_path / "output")):
        with pytest.raises(ValueError, match="no file"):
            distil(prompts="", prompt_file=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": " \n# nothing\n"}, "no prompts"),
        ({"prompts": "{star"}, "brace"),
        ({"prompts": "unheard"}, "unheard"),
        ({"negatives": "unheard"}, "unheard"),
        ({"resolution": 40}, "resolution is 40"),
        ({"time": 0.0}, "time"),
        ({"lowest_time": 0.9, "highest_time": 0.5}, "lowest"),
        ({"guidance_low": 5.0}, "low <= high"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"sample_prompt": "tree", "vae": None}, "VAE"),
        ({"file_name": "../mine"}, "inside models/loras"),
        ({"target_patterns": "no_such_layer"}, "no_such_layer"),
        ({"convention": "cfg"}, "pg-sb"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_done(changes, words, distil, folders):
    with pytest.raises(ValueError, match=words):
        distil(**changes)
    assert not list(folders[0].iterdir()) and not [path for path in folders[1].glob("*") if path.is_dir()]


def test_a_student_that_is_none_is_refused(distil, embedded, tiny):
    from stylewright.nodes.bridge.embedded import load_embedded

    with pytest.raises(ValueError, match="the very model that the teacher is"):
        distil(student=embedded.model)
    with pytest.raises(ValueError, match="SD15 and the teacher"):
        distil(student=tiny("sd15"))
    with torch.inference_mode():
        other = load_embedded()  # of the shipped weights
    with pytest.raises(ValueError, match="other weights than the teacher"):
        distil(student=other.model)
    model, key = embedded.model.clone(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    model.add_patches({key: ("diff", (torch.ones(768, 256),))})
    with pytest.raises(ValueError, match=r"'diff' on diffusion_model.double_blocks.0"):
        distil(student=model)


@pytest.fixture
def notes(monkeypatch):
    """What the node says beside its results."""
    from stylewright.nodes.bridge.previews import TrainingProgress

    said, noted = [], TrainingProgress.noted
    monkeypatch.setattr(TrainingProgress, "noted", lambda self, note: said.append(note) or noted(self, note))
    return said


def test_a_one_step_student_is_no_teacher(first, distil, embedded):
    with pytest.raises(ValueError, match=r"the teacher has a one-step student on it \(first_00001_\.safetensors\)"):
        distil(teacher=with_lora(embedded.model, first))


def test_negatives_that_are_prompts_are_said(distil, notes):
    distil(negatives="circle")
    assert not any("negatives" in note for note in notes)
    distil(negatives="{circle|house}", file_name="same")
    assert any("'house' is among the prompts and among the negatives" in note for note in notes)


def test_another_size_than_the_models_is_said(distil, notes):
    distil(resolution=32)
    assert any("draws pictures of 128 pixels, and resolution is 32" in note for note in notes)


def test_a_student_on_layers_that_are_not_adapted_is_refused(first, distil, embedded):
    with pytest.raises(ValueError, match=r"does not adapt, such as double_blocks\.0\.img_attn\.qkv"):
        distil(student=with_lora(embedded.model, first), target_patterns=r"txt_attn\.qkv")


def test_a_family_without_a_hook_for_negative_prompts_is_refused(distil, monkeypatch):
    from stylewright.nodes.bridge.negative import Unsupported
    from stylewright.nodes.bridge.negative.apply import ATTACH

    monkeypatch.setitem(ATTACH, "Flux", None)
    with pytest.raises(Unsupported, match="no hook"):
        distil(negatives="circle")


def test_a_loss_that_is_no_number_stops_the_run(distil, embedded, monkeypatch):
    from stylewright.training.errors import NonFiniteLoss
    from stylewright.training.loops import score_passes

    loss = score_passes.student_loss
    monkeypatch.setattr(score_passes, "student_loss", lambda *args: loss(*args) * math.nan)
    with pytest.raises(NonFiniteLoss, match="step 1"):
        distil()


def test_widgets_offer_no_value_that_the_run_refuses():
    from stylewright.nodes.distiller import PGSBDistiller
    from stylewright.training.loops.distil_config import DistilConfig

    inputs = {each.id: each for each in PGSBDistiller.define_schema().inputs}
    for name in ("learning_rate", "fake_learning_rate", "time", "steps", "fake_rank", "fake_alpha"):
        DistilConfig(**{name: inputs[name].min})
    DistilConfig(lowest_time=inputs["lowest_time"].max, highest_time=1.0)
    DistilConfig(highest_time=inputs["highest_time"].min, lowest_time=0.0)
    assert "dataset" not in inputs["sample_width"].tooltip + inputs["sample_height"].tooltip


def test_a_student_may_begin_with_its_teachers_pictures(distil, embedded, monkeypatch):
    """By ComfyUI's schedule, shifts included; the scores come after."""
    from comfy.samplers import calculate_sigmas

    from stylewright.nodes.bridge import distilling
    from stylewright.nodes.bridge.distilling import distil as loop
    from stylewright.training.loops.events import read_events

    seen = {}
    monkeypatch.setattr(distilling, "distil", lambda *args, **more: seen.update(more) or loop(*args, **more))
    lessons = {"pretraining_teacher_steps": 3, "pretraining_pairs": 2}
    _, losses, *_ = distil(steps=3, pretraining_steps=2, **lessons)
    assert len(losses["loss"]) == 3
    sigmas = calculate_sigmas(embedded.model.get_model_object("model_sampling"), "simple", 3)
    assert torch.allclose(torch.sigmoid(-seen["schedule"](3) / 2), sigmas, atol=1e-6)
    assert "apart" in read_events(seen["run_dir"].events)[-1].others
    with pytest.raises(ValueError, match="pretraining_steps"):
        distil(steps=2, pretraining_steps=3, file_name="too many")
    with pytest.raises(ValueError, match="with pretraining_steps, or nothing"):
        distil(steps=2, pretraining_guidance=3.0, file_name="none")
    with pytest.raises(ValueError, match="with pretraining_steps some"):
        distil(steps=2, pretraining_pairs=3, file_name="none")
