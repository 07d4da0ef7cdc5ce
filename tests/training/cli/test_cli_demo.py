import json
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stylewright.training.cli.app import run
from stylewright.training.demo import experiment
from stylewright.training.embedded.oracle import Oracle


@pytest.fixture
def demo(workplace, random_weights, monkeypatch, capsys):
    """Runs ``stylewright demo`` on the random model, with one subject and one step of sampling."""
    from stylewright.training.hosts.embedded import load_embedded

    if not random_weights.oracle.exists():
        with torch.random.fork_rng():
            save_file({key: value.clone() for key, value in Oracle().state_dict().items()}, random_weights.oracle)
    monkeypatch.setattr(experiment, "Weights", lambda: random_weights)
    monkeypatch.setattr(experiment, "load_embedded", lambda: load_embedded(random_weights))
    monkeypatch.setattr(experiment, "other_subjects", lambda shown: [1])
    monkeypatch.setattr(experiment, "DemoOptions", partial(experiment.DemoOptions, looks=1, sampling_steps=1))

    def call(*arguments):
        code = run(["demo", *arguments])
        return code, capsys.readouterr()

    return call


def test_json_is_one_object_and_the_results_file(demo, workplace):
    code, printed = demo("--steps", "2", "--style", "glacier", "--subject", "tree", "--out", "here", "--json")
    assert code == 0, printed.err
    answer = json.loads(printed.out)
    results = json.loads((workplace / "here" / "results.json").read_text(encoding="utf-8"))
    page = answer.pop("page")
    assert answer == results
    assert (workplace / page).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (results["style"], results["steps"], results["seed"]) == ("glacier", 2, 0)
    for law in results["laws"].values():
        assert law.keys() >= {"style_score", "subject_score", "seconds"}


def test_text_says_the_scores_and_where_the_page_is(demo, workplace):
    Image.new("RGB", (40, 60), (200, 30, 90)).save(workplace / "mine.png")
    code, printed = demo("--steps", "1", "--image", "mine.png", "--seed", "3")
    assert code == 0, printed.err
    results = json.loads((workplace / "demo" / "results.json").read_text(encoding="utf-8"))
    assert results["style"] == "mine.png" and results["seed"] == 3
    for name, law in results["laws"].items():
        line = next(line for line in printed.out.splitlines() if line.startswith(name))
        assert f"style {law['style_score']:.2f}, subject {law['subject_score']:.2f}" in line
    assert "demo/index.html" in printed.out.replace("\\", "/")
    assert "learning, sd3 law" in printed.err  # progress is not among the results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--style", "jazz"], "there is no style 'jazz': expected one of regatta"),
        (["--subject", "giraffe"], "'giraffe'"),
        (["--steps", "0"], "got 0 steps"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(demo, workplace, arguments, message):
    code, printed = demo(*arguments, "--out", "nothing", "--json")
    assert code == 1 and printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1 and message in printed.err
    assert not (workplace / "nothing").exists()
