import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from stylewright.training.demo import report
from stylewright.training.demo.report import write_report
from stylewright.training.embedded.renderer import SIZE, SUBJECTS


def test_the_page_shows_every_picture_there_is(finished):
    _, out, _ = finished
    page = (out / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert len(shown) == len(set(shown))
    assert set(shown) == {path.name for path in out.glob("*.png")}
    looks = [f"{law}-{step:04}.png" for law in ("style-friendly", "sd3") for step in (1, 2, 3)]
    strips = ["reference.png", "truth.png", "before.png", *looks]
    assert shown == [*strips, "densities.png", "loss.png", "style.png", "subject.png"]


def test_strips_are_the_pictures(finished):
    result, out, _ = finished
    for name, count in (("reference", 1), ("truth", 2), ("before", 2), ("sd3-0002", 2)):
        with Image.open(out / f"{name}.png") as strip:
            assert strip.size == (count * SIZE, SIZE)
    with Image.open(out / "reference.png") as strip:
        pixels = torch.frombuffer(bytearray(strip.convert("RGB").tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(SIZE, SIZE, 3).movedim(-1, 0), (result.reference * 255).round().byte())


def test_the_page_says_scores_and_what_was_asked(finished):
    result, out, _ = finished
    page = (out / "index.html").read_text(encoding="utf-8")
    for law in result.laws.values():
        for look in law.looks:
            assert f"style {look.score.style:.2f}, subject {look.score.subject:.2f}" in page
        assert f"<td>{law.seconds:.1f}</td>" in page
    assert "(regatta)" in page and "&lt;v0&gt;" in page and "for 3 steps" in page
    others = [name for name in SUBJECTS if name != "star"]
    assert ", ".join(others) in page


def test_the_curves_begin_before_training(finished, tmp_path, monkeypatch):
    result, _, _ = finished
    drawn = {}
    monkeypatch.setattr(report, "plot_curves", lambda path, curves, labels: drawn.update({path.name: (curves, labels)}))
    write_report(result, tmp_path / "report")
    assert drawn.keys() == {"loss.png", "style.png", "subject.png"}
    style, labels = drawn["style.png"]
    assert labels == ("step", "style score")
    assert [step for step, _ in style["sd3"]] == [0, 1, 2, 3]
    assert style["sd3"][0][1] == result.before.score.style
    assert style["sd3"][-1][1] == result.laws["sd3"].looks[-1].score.style
    assert drawn["subject.png"][0]["sd3"][-1][1] == result.laws["sd3"].looks[-1].score.subject
    assert [step for step, _ in drawn["loss.png"][0]["sd3"]] == [event.step for event in result.laws["sd3"].history]


def test_the_densities_are_those_that_were_trained_with(finished, tmp_path, monkeypatch):
    """At 64 tokens: medians of -6 and -2.2, moved by log(64)."""
    drawn = {}
    monkeypatch.setattr(report, "plot_densities", lambda path, laws: drawn.update(laws))
    write_report(finished[0], tmp_path)
    median = torch.tensor([0.5], dtype=torch.float64)
    assert {name: law.icdf(median).item() for name, law in drawn.items()} == {
        "style-friendly": pytest.approx(-6 + 4.1589, abs=1e-3),
        "sd3": pytest.approx(-2.1972 + 4.1589, abs=1e-3),
    }


def test_a_picture_of_the_users_own_has_no_truth_and_no_style(finished, tmp_path):
    result, _, _ = finished
    mine = replace(result, truth=None, options=replace(result.options, image=tmp_path / "my <b> picture.png"))
    page = write_report(mine, tmp_path / "out").read_text(encoding="utf-8")
    assert "truth.png" not in page and not (tmp_path / "out" / "truth.png").exists()
    assert "my &lt;b&gt; picture.png" in page and "regatta" not in page
