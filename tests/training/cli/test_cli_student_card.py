from dataclasses import replace

import pytest

from stylewright.training.cli import student_card
from stylewright.training.cli.app import run
from stylewright.training.embedded.weights import Weights
from stylewright.training.formats.contents import read_outline
from stylewright.training.metrics import Interval


def test_the_shipped_student_says_how_it_was_made_and_is_small():
    file = Weights().student
    about = read_outline(file).about
    assert about is not None and about.one_step["level"] == 1.0 and about.resolution == 128
    assert file.stat().st_size < 5_000_000
    command = student_card.command_of(about)
    assert command.startswith("stylewright distill --model embedded --out RUN --steps ")
    assert "--convention dmd" in command and "--guidance-high" not in command  # as usual


def test_a_command_names_what_is_not_as_usual_and_parts_of_tables_by_their_dots():
    about = read_outline(Weights().student).about
    training = {**about.training, "seed": 3, "adapter": {**about.training["adapter"], "rank": 8}}
    command = student_card.command_of(replace(about, training=training))
    assert "--seed 3" in command and "--adapter.rank 8" in command


def test_a_card_has_the_figures_of_student_and_teacher(tmp_path, monkeypatch):
    seen = []

    def judge(host, oracle, prompts, **drawing):
        seen.append((len(prompts), drawing.get("one_step"), drawing.get("steps")))

    monkeypatch.setattr(student_card, "judge", judge)
    monkeypatch.setattr(student_card, "figures", lambda _: {"subject": Interval(0.75, 0.7, 0.8, 10)})
    shipped = Weights()
    for path in (shipped.transformer, shipped.autoencoder, shipped.text_encoder, shipped.oracle):
        (tmp_path / path.name).symlink_to(path)
    text = student_card.write_student_card(Weights(tmp_path), student=shipped.student, n=10).read_text()
    assert [count for count, _, _ in seen] == [10, 2] * 3
    assert [steps for _, level, steps in seen if level is None] == [28] * 3
    assert "| known styles, by words, student, 1 step, n = 10 | 0.750 |" in text and "4.6 MB" in text


def test_a_file_that_is_no_student_is_refused(workplace, capsys):
    small = ["--resolution", "64", "--accumulation", "1", "--rank", "2", "--style-phrase", "<v0>", "--steps", "1"]
    assert run(["train", *small, "--images", "pictures", "--out", "run"]) == 0
    assert run(["embedded", "student-card", "--student", "run/adapter.safetensors"]) == 1
    assert "does not say that it is a one-step student" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "code"), [("bfloat16", 0), ("int8", 1)])
def test_convert_to_another_type(dtype, code, tmp_path):
    target = tmp_path / "out.safetensors"
    assert run(["convert", str(Weights().student), str(target), "--style", "kohya", "--dtype", dtype]) == code
    assert target.exists() == (code == 0)
