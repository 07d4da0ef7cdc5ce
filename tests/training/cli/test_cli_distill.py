import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylewright.training.cli.app import run
from stylewright.training.cli.distill import DistilJob, likeness_of, prompts_of, stated_prompts
from stylewright.training.cli.distill import run as distill_now
from stylewright.training.cli.launch import Launch
from stylewright.training.embedded.oracle import Oracle
from stylewright.training.hosts import loading
from stylewright.training.hosts.loading import load_host
from stylewright.training.loops.distil_config import DistilConfig

SMALL = ["distill", "--resolution", "32", "--batch-size", "2", "--rank", "2", "--fake-rank", "2", "--out", "run"]


def printed(capsys, *arguments: str) -> dict:
    code = run([*arguments, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def refused(capsys, *arguments: str) -> str:
    assert run(arguments) == 1
    return capsys.readouterr().err


def test_distil_continue_and_draw_in_one_step(workplace, capsys):
    sampled = ["--sample-every", "2", "--sample-prompts", "star in jazz style"]
    result = printed(capsys, *SMALL, *sampled, "--steps", "2", "--guidance-low", "2", "--guidance-high", "3")
    assert result["steps"] == 2 and result["apart"] > 0
    assert (workplace / "run" / "samples" / "step-000002-0.png").exists()
    longer = printed(capsys, *SMALL, *sampled, "--steps", "3", "--guidance-low", "2", "--guidance-high", "3")
    assert longer["steps"] == 3
    events = [json.loads(line) for line in (workplace / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events][-1] == 3

    report = printed(capsys, "inspect", longer["student"])
    assert json.loads(report["metadata"]["stylewright.one_step"])["level"] == 1.0
    drawn = printed(capsys, "generate", "--adapter", longer["student"], "--prompt", "star", "--size", "32x32")
    assert len(drawn["pictures"]) == 1
    drawing = ["generate", "--adapter", longer["student"], "--prompt", "star"]
    assert "leave --guidance and" in refused(capsys, *drawing, "--guidance", "3")
    assert "leave --steps 4 out" in refused(capsys, *drawing, "--steps", "4")
    away = printed(capsys, *drawing, "--size", "32x32", "--negative", "tree")
    one, other = (Path(each["pictures"][0]["file"]).read_bytes() for each in (drawn, away))
    assert one != other
    assert "give that command again" in refused(capsys, "resume", "run")


def test_pictures_are_compared_with_prompts_by_the_models_own_features_or_by_a_clip(workplace, random_weights, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(Oracle().state_dict(), random_weights.oracle)
    likeness = ["--clip-weight", "0.1", "--clip-threshold", "0.9", "--clip-samples", "1", "--resolution", "64"]
    assert 0 < printed(capsys, *SMALL, "--steps", "1", *likeness)["likeness"] < 1
    said = refused(capsys, *SMALL, "--steps", "1", *likeness, "--out", "other", "--clip", "pictures")
    assert "config.json" in said and not (workplace / "other").exists()
    assert "do nothing without --clip-weight" in refused(capsys, *SMALL, "--clip", "pictures", "--out", "other")


def test_a_model_without_features_needs_a_clip():
    host = replace(load_host("embedded"), name="mine", open_features=None)
    with pytest.raises(ValueError, match="--clip names the folder of a CLIP"):
        likeness_of(DistilJob(), DistilConfig(clip_weight=0.1), host)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resolution", "-16"], "Got resolution=-16"),
        (["--resolution", "0"], "Got resolution=0"),
        (["--sample-every", "2", "--sample-prompts", "a zebra"], "zebra"),
        (["--guidance-high", "inf"], "guidance_low=0.5, guidance_high=inf"),
        (["--full"], "trains all weights"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(more, message, workplace, capsys):
    assert message in refused(capsys, *SMALL, "--steps", "3", *more)
    assert not (workplace / "run").exists()


def test_another_run_in_the_folder_is_refused(workplace, capsys):
    printed(capsys, *SMALL, "--steps", "1")
    assert "seed was 0 and is 1" in refused(capsys, *SMALL, "--steps", "1", "--seed", "1")


def test_a_run_goes_on_with_its_own_model(workplace, capsys, monkeypatch):
    printed(capsys, *SMALL, "--steps", "1")
    monkeypatch.setattr(loading, "load_host", lambda model, *args, **more: load_host("embedded", *args, **more))
    said = refused(capsys, *SMALL, "--steps", "2", "--model", "models/another")
    assert "base_model was 'embedded' and is 'another'" in said


def test_what_is_known_by_a_hash_alone_is_said_in_words(workplace, capsys):
    student = printed(capsys, *SMALL, "--steps", "1")["student"]
    assert "the prompts are others" in refused(capsys, *SMALL, "--steps", "1", "--prompt", "a star")
    said = refused(capsys, *SMALL, "--steps", "1", "--init-adapter", student)
    assert (
        "an adapter or model to begin with is given now, and there was none. Continue it with what it began with"
        in said
    )
    printed(capsys, *SMALL, "--steps", "1", "--init-adapter", student, "--out", "second")
    assert "is given no more, and there was one" in refused(capsys, *SMALL, "--steps", "1", "--out", "second")
    other = printed(capsys, *SMALL, "--steps", "1", "--seed", "1", "--ema-decay", "0", "--out", "other")["student"]
    again = [*SMALL, "--steps", "1", "--init-adapter", other, "--out", "second"]
    assert "the adapter or model to begin with is another" in refused(capsys, *again)


def test_a_student_without_its_checkpoint_is_never_written_over(workplace, capsys):
    student = workplace / "run" / "adapter.safetensors"
    printed(capsys, *SMALL, "--steps", "1")
    (workplace / "run" / "checkpoint.safetensors").unlink()
    before = student.read_bytes()
    assert "but no checkpoint" in refused(capsys, *SMALL, "--steps", "1", "--seed", "1")
    assert student.read_bytes() == before


def test_a_student_of_another_time_is_no_beginning(workplace, capsys):
    early = printed(capsys, *SMALL, "--steps", "1", "--time", "0.4", "--out", "early")["student"]
    said = refused(capsys, *SMALL, "--steps", "1", "--init-adapter", early)
    assert "level is 0.4" in said and "this run's is 1" in said and not (workplace / "run").exists()
    assert printed(capsys, *SMALL, "--steps", "1", "--time", "0.4", "--init-adapter", early)["steps"] == 1


def test_a_file_has_the_names_of_the_flags(workplace, capsys):
    (workplace / "distill.toml").write_text(
        'steps = 1\nbatch_size = 2\nresolution = 32\nout = "run"\nprompt = ["a {star|tree}"]\nfake_rank = 2\n'
        "[adapter]\nrank = 2\n"
    )
    assert printed(capsys, "distill", "--config", "distill.toml")["steps"] == 1
    config = json.loads((workplace / "run" / "config.json").read_text())
    assert config["adapter"]["rank"] == 2 and config["batch_size"] == 2
    (workplace / "distill.toml").write_text("guidance_lo = 1\n")
    assert "did you mean guidance_low?" in refused(capsys, "distill", "--config", "distill.toml")


@pytest.mark.parametrize("wrong", [["--prompts", "none.txt"], ["--prompt", "{star"]])
def test_prompts_are_read_before_the_model(wrong, workplace, monkeypatch, capsys):
    monkeypatch.setattr("stylewright.training.hosts.loading.load_host", lambda *_, **__: pytest.fail("it was loaded"))
    refused(capsys, *SMALL, "--steps", "1", *wrong)
    assert not (workplace / "run").exists()


def test_prompts_come_from_flags_a_file_and_the_model_and_get_the_style_phrase(workplace):
    host = load_host("embedded")
    (workplace / "prompts.txt").write_text("a {house|star}\n")
    both = DistilJob(prompt=("a tree",), prompts="prompts.txt", style_phrase="<v0>")
    prompts = prompts_of(both, host, stated_prompts(both, workplace))
    assert prompts.lines == ("a tree in <v0> style",) and tuple(prompts.file) == ("a {house|star}",)
    drawn = {prompt for step in range(20) for prompt in prompts.drawn(0, step, 4)}
    assert drawn == {"a tree in <v0> style", "a house in <v0> style", "a star in <v0> style"}
    assert prompts_of(DistilJob(), host, None).lines == host.prompts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution", "40"], "multiples of 16"),
        (["--prompt", "{star"], "brace"),
        (["--prompts", "none.txt"], "Cannot read"),
        (["--prompt", ""], "which is empty"),
        (["--negative-prompts", "{star"], "brace"),
        (["--negative-prompts", "zebra"], "does not know 'zebra'"),
        (["--prompt", "zebra"], "does not know 'zebra'"),
        (["--time", "2"], "time=2.0"),
        (["--model", "nowhere"], "no model at"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(arguments, words, workplace, capsys):
    assert words in refused(capsys, *SMALL, "--steps", "1", *arguments)
    assert not (workplace / "run").exists()


def test_a_style_becomes_a_one_step_style_in_one_file(workplace, capsys):
    trained = ["train", "--images", "pictures", "--resolution", "32", "--steps", "1", "--rank", "2"]
    style = printed(capsys, *trained, "--style-phrase", "<v3>", "--out", "style")["adapter"]
    result = printed(capsys, *SMALL, "--steps", "1", "--prompt", "{star|tree}", "--teacher-adapter", style)
    metadata = printed(capsys, "inspect", result["student"])["metadata"]
    assert metadata["stylewright.style_phrase"] == "<v3>" and metadata["stylewright.one_step"]
    drawn = printed(capsys, "generate", "--adapter", result["student"], "--prompt", "star", "--size", "32x32")
    assert drawn["pictures"][0]["prompt"] == "star in <v3> style"
    longer = ["--steps", "1", "--out", "longer", "--init-adapter", result["student"]]
    assert printed(capsys, *SMALL, *longer)["steps"] == 1
    said = refused(capsys, *SMALL, "--steps", "1", "--out", "other", "--teacher-adapter", result["student"])
    assert "is a one-step student, and no teacher" in said and not (workplace / "other").exists()


def test_all_weights_learn_and_are_drawn_with(workplace, capsys):
    rank = SMALL.index("--rank")
    whole = SMALL[:rank] + SMALL[rank + 2 :]
    result = printed(capsys, *whole, "--steps", "1", "--full", "--learning-rate", "1e-3")
    assert result["student"].endswith("student.safetensors")
    drawing = ["generate", "--prompt", "star", "--size", "32x32", "--adapter", result["student"]]
    assert len(printed(capsys, *drawing)["pictures"]) == 1
    assert "never guided" in refused(capsys, *drawing, "--guidance", "3")
    again = [*whole, "--steps", "1", "--init-model", result["student"], "--out", "again"]
    assert "without --full" in refused(capsys, *again)
    assert "begins with one of them" in refused(capsys, *again, "--full", "--init-adapter", "it.safetensors")
    assert not (workplace / "again").exists()
    second = printed(capsys, *again, "--full", "--learning-rate", "1e-9", "--ema-decay", "0")
    begun, found = (load_file(each["student"]) for each in (result, second))
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in begun.items())
    assert "is of the kind" not in refused(capsys, *again, "--full", "--time", "0.4", "--out", "other")


def test_a_model_is_placed_twice_where_all_weights_of_its_parts_learn(workplace):
    """Once to train and once as it was, by what puts a model into parts; then the student is the same."""
    options = DistilConfig(steps=2, batch_size=2, full=True, fake_rank=2, learning_rate=1e-3)
    placed = []

    def place(module):
        placed.append((next(module.parameters()).requires_grad, {tensor.dtype for tensor in module.parameters()}))
        return module

    for name, launch in {"whole": Launch(), "in parts": Launch(place=place)}.items():
        distill_now(DistilJob(resolution=32, out=name), options, False, launch)
    assert placed == [(False, {torch.float32}), (True, {torch.float32})]
    whole, parts = (load_file(workplace / name / "student.safetensors") for name in ("whole", "in parts"))
    assert all(torch.equal(parts[key], tensor) for key, tensor in whole.items())


def test_a_student_may_begin_with_its_teachers_pictures(workplace, capsys):
    pairs = ["--pretraining-steps", "1", "--pretraining-teacher-steps", "2", "--pretraining-pairs", "2"]
    assert "apart" not in printed(capsys, *SMALL, *pairs, "--steps", "1")
    assert "apart" in printed(capsys, *SMALL, *pairs, "--steps", "2")
    assert "with pretraining_steps" in refused(capsys, *SMALL, "--pretraining-pairs", "2", "--out", "other")


def test_an_option_of_the_adapter_leaves_the_others_as_a_distillation_has_them():
    from stylewright.training.cli.distill import FLAGS
    from stylewright.training.loops.distil_config import DistilConfig
    from stylewright.training.loops.tables import from_table

    adapter = from_table(DistilConfig, {"adapter": {"alpha": 8.0}}).adapter
    assert (adapter.alpha, adapter.rank, adapter.targets) == (8.0, 64, "all")
    helps = {flag.path: flag.help for flag in FLAGS}
    assert helps["adapter", "rank"].endswith("(default: 64)") and helps["adapter", "targets"].endswith("(default: all)")
