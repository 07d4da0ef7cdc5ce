import numpy as np
import pytest
import torch
from PIL import Image

from stylewright.training.demo import figures
from stylewright.training.demo.figures import plot_curves, plot_densities, save_strip
from stylewright.training.densities import Normal, UniformTime


def read(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of what is saved, which is saved as well."""
    found = []
    save = figures._save

    def keep(figure, path):
        found.append(figure.axes[0])
        save(figure, path)

    monkeypatch.setattr(figures, "_save", keep)
    return found


def test_a_strip_is_its_pictures_side_by_side(tmp_path):
    pictures = torch.rand(3, 3, 5, 7)
    path = tmp_path / "deep" / "strip.png"
    save_strip(path, pictures)
    strip = read(path)
    assert strip.shape == (3, 5, 21)
    for i, picture in enumerate(pictures):
        assert torch.equal(strip[:, :, 7 * i : 7 * i + 7], (picture * 255).round().byte())


def test_a_strip_can_be_enlarged_and_keeps_to_its_range(tmp_path):
    pictures = torch.tensor([-0.4, 0.5, 1.7]).view(1, 3, 1, 1).expand(2, 3, 4, 6)
    save_strip(tmp_path / "strip.png", pictures, scale=3)
    strip = read(tmp_path / "strip.png")
    assert strip.shape == (3, 12, 36)
    assert strip.flatten(1).unique(dim=1).flatten().tolist() == [0, 128, 255]


def test_densities_are_drawn_as_they_are(drawn, tmp_path):
    laws = {"low": Normal(-6.0, 2.0), "even": UniformTime()}
    plot_densities(tmp_path / "densities.png", laws)
    (axes,) = drawn
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert lines.keys() == laws.keys() == {text.get_text() for text in axes.get_legend().get_texts()}
    x, y = lines["low"].T
    np.testing.assert_allclose(y, np.exp(-((x + 6) ** 2) / 8) / np.sqrt(8 * np.pi), atol=1e-4)
    x, y = lines["even"].T
    time = 1 / (1 + np.exp(x / 2))
    np.testing.assert_allclose(y, time * (1 - time) / 2, atol=1e-4)  # dt/dlog_snr
    assert axes.get_xlim()[0] < axes.get_xlim()[1]
    assert read(tmp_path / "densities.png").shape[0] in (3, 4)


def test_the_top_of_a_density_says_the_time(drawn, tmp_path):
    plot_densities(tmp_path / "densities.png", {"low": Normal(-6.0, 2.0)})
    (top,) = drawn[0].child_axes
    labels = dict(zip(top.get_xticks(), (label.get_text() for label in top.get_xticklabels()), strict=True))
    assert labels[0.0] == "t = 0.500"
    assert labels[-8.0] == "t = 0.982" and labels[8.0] == "t = 0.018"


def test_curves_go_through_their_points(drawn, tmp_path):
    curves = {"one": [(0, 0.5), (3, 0.25)], "other": [(0, 1.0)]}
    plot_curves(tmp_path / "deep" / "curves.png", curves, ("step", "loss"))
    (axes,) = drawn
    assert {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines} == curves
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert len({line.get_color() for line in axes.lines}) == 2
    assert (tmp_path / "deep" / "curves.png").is_file()
