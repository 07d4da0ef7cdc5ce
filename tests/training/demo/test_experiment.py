import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from stylewright.training.demo import experiment
from stylewright.training.demo.experiment import (
    FREE_WORD,
    LAWS,
    RECIPE,
    DemoOptions,
    Look,
    run_experiment,
    write_results,
)
from stylewright.training.demo.scoring import Score
from stylewright.training.densities import mean_time
from stylewright.training.density_presets import build_density
from stylewright.training.embedded.renderer import HELD_OUT_STYLES, SIZE, SUBJECTS, Style
from stylewright.training.embedded.vocabulary import FREE_WORDS

OVER_ALL = (-math.inf, math.inf)


def scores(result):
    """Everything that a demo measures but the time it took."""
    looks = {name: [(look.step, look.score) for look in law.looks] for name, law in result.laws.items()}
    losses = {name: [event.loss for event in law.history] for name, law in result.laws.items()}
    return result.before.score, looks, losses


def test_both_laws_learn_from_the_same_picture(finished):
    result, _, told = finished
    assert list(result.laws) == ["style-friendly", "sd3"]
    for name, law in result.laws.items():
        assert [look.step for look in law.looks] == [1, 2, 3]
        assert all(look.pictures.shape == (2, 3, SIZE, SIZE) for look in law.looks)
        assert all(0 <= value <= 1 for look in law.looks for value in (look.score.style, look.score.subject))
        assert law.seconds > 0
        assert [entry for entry in told if entry[0] == name][-1] == (name, 3, 3)
    assert result.reference.shape == (3, SIZE, SIZE) and result.truth.shape == (2, 3, SIZE, SIZE)
    assert result.before.step == 0


def test_learning_changes_the_pictures_and_the_law_matters(finished):
    result = finished[0]
    friendly, sd3 = (law.looks[-1].pictures for law in result.laws.values())
    assert not torch.equal(friendly, result.before.pictures)
    assert not torch.equal(friendly, sd3)


def test_a_repeated_demo_in_the_same_folder_is_the_same(finished, small_demo):
    """Nothing of the first is taken up: it would be continued, and have nothing left to do."""
    first, out, _ = finished
    again, _ = small_demo(out, looks=3)
    assert scores(again) == scores(first)
    for name, law in first.laws.items():
        for one, other in zip(again.laws[name].looks, law.looks, strict=True):
            assert torch.equal(one.pictures, other.pictures)


def test_looking_changes_nothing(finished, small_demo, tmp_path):
    once, _ = small_demo(tmp_path / "out", looks=1)
    for name, law in finished[0].laws.items():
        assert torch.equal(once.laws[name].looks[-1].pictures, law.looks[-1].pictures)


def test_results_hold_scores_and_seconds_by_law(finished):
    result, out, _ = finished
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["style"] == "regatta" and results["steps"] == 3 and results["seed"] == 0
    assert results["laws"].keys() == {"style-friendly", "sd3"}
    for name, law in results["laws"].items():
        last = result.laws[name].looks[-1].score
        assert (law["style_score"], law["subject_score"]) == (last.style, last.subject)
        assert law["seconds"] == result.laws[name].seconds
        assert [look["step"] for look in law["looks"]] == [1, 2, 3]
    assert results["before"] == {
        "style_score": result.before.score.style,
        "subject_score": result.before.score.subject,
    }


def test_results_are_of_the_last_look(finished, tmp_path):
    result = finished[0]
    look = Look(9, result.before.pictures, Score(0.875, 0.125))
    laws = {name: replace(law, looks=[*law.looks, look]) for name, law in result.laws.items()}
    results = write_results(replace(result, laws=laws), tmp_path / "deep" / "results.json")
    assert results["laws"]["sd3"]["style_score"] == 0.875 and results["laws"]["sd3"]["subject_score"] == 0.125
    assert json.loads((tmp_path / "deep" / "results.json").read_text(encoding="utf-8")) == results


def test_a_picture_of_the_users_own(small_demo, tmp_path):
    path = tmp_path / "mine.png"
    Image.new("RGBA", (200, 90), (20, 200, 90, 255)).save(path)
    result, _ = small_demo(tmp_path / "out", image=path, subject="house")
    assert result.truth is None
    expected = torch.tensor([20, 200, 90]).div(255).view(3, 1, 1).expand(3, SIZE, SIZE)
    torch.testing.assert_close(result.reference, expected)
    assert result.before.score.style == pytest.approx(0, abs=1e-6)  # where the way begins
    results = write_results(result, tmp_path / "results.json")
    assert results["style"] == str(path)


def test_the_reference_is_drawn_in_the_style_and_the_truth_too():
    options = DemoOptions(style="furnace", subject="house", seed=4)
    reference, truth = experiment._reference(options)
    assert truth.shape == (len(SUBJECTS) - 1, 3, SIZE, SIZE)
    palette = torch.tensor([[0x2B, 0x0A, 0x05], [0x6B, 0x15, 0x08], [0xFF, 0xB3, 0x00], [0xFF, 0x3D, 0x00]]) / 255
    for picture in (reference, *truth):
        pixels = picture.flatten(1).T
        assert torch.cdist(pixels[:: SIZE // 4], palette).amin(1).median() < 0.01
    again, _ = experiment._reference(options)
    other, _ = experiment._reference(replace(options, seed=5))
    assert torch.equal(again, reference) and not torch.equal(other, reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "jazz"}, "no style 'jazz': expected one of regatta, herbarium"),
        ({"subject": "giraffe"}, "no 'giraffe': expected one of circle, square"),
        ({"steps": 0}, "got 0 steps"),
        ({"steps": -3}, "got -3 steps"),
        ({"looks": 0}, "0 looks"),
        ({"image": "missing.png"}, r"missing\.png"),
        ({"image": "text.png"}, r"text\.png"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(changes, message, tmp_path, monkeypatch):
    def forbidden(*_):
        raise AssertionError("work was begun")

    monkeypatch.setattr(experiment, "load_embedded", forbidden)
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    if "image" in changes:
        changes = {"image": tmp_path / changes["image"]}
    with pytest.raises((ValueError, OSError), match=message):
        run_experiment(DemoOptions(**changes), tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("steps", "looks", "every"), [(60, 3, 20), (50, 3, 25), (61, 3, 61), (3, 1, 3), (2, 3, 1), (60, 7, 10)]
)
def test_looks_are_even_and_end_with_the_last_step(steps, looks, every):
    options = DemoOptions(steps=steps, looks=looks)
    assert options.look_every == every
    assert steps % every == 0 and steps // every <= looks


def test_the_laws_are_the_papers_at_the_models_size():
    """N(-6, 2^2) and SD3's N(-2.2, 2^2) of 4096 tokens, moved by log(4096 / 64)."""
    for name, mean in (("style-friendly", -6.0), ("sd3", -2 * math.log(3))):
        law = build_density(LAWS[name], OVER_ALL, 64)
        median = law.icdf(torch.tensor([0.5], dtype=torch.float64)).item()
        assert median == pytest.approx(mean + math.log(64), abs=1e-3)
    friendly, sd3 = (mean_time(build_density(law, OVER_ALL, 64)) for law in LAWS.values())
    assert 0.6 < friendly < 0.75 and 0.2 < sd3 < 0.4  # 1 is noise


def test_the_demo_teaches_a_free_word():
    assert FREE_WORD in FREE_WORDS and RECIPE.style_phrase == FREE_WORD
    assert DemoOptions().style in HELD_OUT_STYLES and isinstance(HELD_OUT_STYLES["regatta"], Style)


def test_the_shipped_model_learns_a_style_from_one_picture(shipped, tmp_path, monkeypatch):
    """The demo itself, shortened: a third of its steps, one law, three subjects that the picture does not show."""
    monkeypatch.setattr(experiment, "other_subjects", lambda shown: [0, 7, 9])
    monkeypatch.setattr(experiment, "LAWS", {"style-friendly": LAWS["style-friendly"]})
    options = DemoOptions(style="glacier", steps=20, looks=1, sampling_steps=6)
    result = run_experiment(options, tmp_path, lambda *_: None)
    (look,) = result.laws["style-friendly"].looks
    assert look.score.style >= result.before.score.style + 0.15
    assert look.score.subject > 0.3
