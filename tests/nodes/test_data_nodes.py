"""Style Dataset and Noise Level Density as their graphs call them."""

import math

import pytest
import torch

pytestmark = pytest.mark.comfy

LINKED = "[from the images input]"


def dataset(**changes):
    from stylewright.nodes.dataset import StyleDatasetNode

    plain = {
        "captions": ["a cat"], "style_phrase": ["watercolor painting"], "resolution": [256], "folder": [LINKED],
        "caption_mode": ["content"],
    }  # fmt: skip
    return StyleDatasetNode.execute(**{**plain, **changes}).args


@pytest.fixture
def input_folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    folder = tmp_path / "input" / "cats"
    folder.mkdir(parents=True)
    return folder


def save_picture(path, size=(40, 24)):
    from PIL import Image

    Image.new("RGB", size, (200, 30, 60)).save(path)


def test_batches_of_unlike_sizes_become_items():
    images = [torch.rand(2, 24, 40, 3), torch.rand(1, 32, 16, 4)]
    masks = [torch.ones(2, 24, 40), torch.ones(32, 16)]
    made, captions = dataset(images=images, masks=masks, captions=["a cat\n\na dog\na hen "])
    assert [tuple(item.image.shape) for item in made.items] == [(3, 24, 40), (3, 24, 40), (3, 32, 16)]
    assert torch.equal(made.items[1].image, images[0][1].movedim(-1, 0))
    assert torch.equal(made.items[2].image, images[1][0, ..., :3].movedim(-1, 0))
    assert made.items[2].mask.shape == (32, 16)
    assert captions.split("\n") == [f"a {what} in watercolor painting style" for what in ("cat", "dog", "hen")]
    assert (made.resolution, made.style_phrase, made.caption_mode) == (256, "watercolor painting", "content")


def test_one_caption_is_for_all_and_a_list_is_one_each():
    images = [torch.rand(2, 24, 40, 3)]
    assert dataset(images=images)[1].split("\n") == ["a cat in watercolor painting style"] * 2
    assert (
        dataset(images=images, captions=["a cat", "a\ndog"])[1].split("\n")[1] == "a dog in watercolor painting style"
    )


def test_a_folder_is_read(input_folder):
    from stylewright.nodes.dataset import StyleDatasetNode

    save_picture(input_folder / "one.png")
    (input_folder / "one.txt").write_text("a red card")
    made, captions = dataset(folder=["cats"], captions=[""])
    assert captions == "a red card in watercolor painting style"
    assert made.items[0].image == input_folder / "one.png"
    before = StyleDatasetNode.fingerprint_inputs(folder=["cats"])
    (input_folder / "one.txt").write_text("a very red card")
    assert StyleDatasetNode.fingerprint_inputs(folder=["cats"]) != before
    assert StyleDatasetNode.fingerprint_inputs(folder=[LINKED]) is None
    options = next(each for each in StyleDatasetNode.define_schema().inputs if each.id == "folder").options
    assert options == [LINKED, "cats"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no pictures"),
        ({"images": [torch.rand(2, 8, 8, 3)], "captions": ["a\nb\nc"]}, "2 pictures and 3 captions"),
        ({"images": [torch.rand(1, 8, 8, 3)], "captions": [" \n"]}, "no captions"),
        ({"images": [torch.rand(1, 8, 8, 3)], "style_phrase": [" "]}, "style phrase"),
        ({"images": [torch.rand(1, 8, 8, 3)], "caption_mode": ["full"]}, "missing from 1 of 1 captions"),
        ({"images": [torch.rand(2, 8, 8, 3)], "masks": [torch.ones(1, 8, 8)]}, "2 pictures and 1 masks"),
        ({"folder": ["cats"], "captions": ["a cat"]}, "captions would be ignored"),
        ({"folder": ["cats"], "captions": [""], "images": [torch.rand(1, 8, 8, 3)]}, "images would be ignored"),
        ({"folder": ["cats"], "captions": [""]}, "No pictures in"),
        ({"folder": ["dogs"], "captions": [""]}, "no folder 'dogs'"),
        ({"folder": ["../cats"], "captions": [""]}, "not a folder below"),
        ({"folder": ["/etc"], "captions": [""]}, "not a folder below"),
    ],
)
def test_bad_input_is_named(changes, message, input_folder):
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_unreadable_and_captionless_files_are_named(input_folder):
    save_picture(input_folder / "alone.png")
    with pytest.raises(ValueError, match=r"without captions: alone\.png"):
        dataset(folder=["cats"], captions=[""])


def density(model=None, **changes):
    from stylewright.nodes.density import StyleDensityNode

    class Node(StyleDensityNode):
        hidden = None

    plain = {"law": "normal", "mu": -6.0, "sigma": 2.0, "reference_tokens": 0, "shift": 1.0, "resolution": 1024}
    return Node.execute(**{**plain, **changes}, model=model)


def test_a_density_is_stated_and_drawn():
    out = density()
    config = out.args[0].config
    assert (config.preset, config.mu, config.sigma, config.reference_tokens) == ("style-friendly", -6.0, 2.0, None)
    picture = out.args[1]
    assert picture.shape == (1, 360, 640, 3) and picture.dtype == torch.float32
    assert 0 <= picture.min() < 0.5 and picture.max() == 1
    assert out.ui.as_dict()["images"]
    assert density(law="sd3").args[0].config.mu is None
    assert not torch.equal(density(law="sd3").args[1], picture)


def test_the_picture_shows_where_the_law_is():
    from stylewright.nodes.density_picture import LEFT, RIGHT, axis_of, curve
    from stylewright.training.densities import DensityConfig, build_density

    law = build_density(DensityConfig(mu=-6.0, sigma=2.0), (-math.inf, math.inf), 4096)
    axis = axis_of(law)
    points = curve(law, axis)
    top = min(range(len(points)), key=lambda i: points[i][1])
    log_snr = axis.low + top / len(points) * (axis.high - axis.low)
    assert log_snr == pytest.approx(-6.0, abs=0.05)
    assert len(points) == (RIGHT - LEFT) * 3


def test_the_resolution_rule_and_a_model_s_range_show(tiny):
    from stylewright.nodes.density_picture import summary
    from stylewright.training.densities import DensityConfig, build_density, style_window

    config = density(reference_tokens=4096, resolution=128).args[0].config
    text = summary(build_density(config, (-math.inf, math.inf), 64), style_window(config, 64))
    assert "median -1.84" in text and "39.7 % in the style window" in text  # the window is carried with the law
    unbounded = density().args[1]
    assert not torch.equal(density(model=tiny("sd15")).args[1], unbounded)
    assert "39.7 % in the style window" in summary(build_density(DensityConfig(), (-math.inf, math.inf), 4096), -6.52)


def test_the_axis_is_where_the_law_is():
    from stylewright.nodes.density_picture import axis_of
    from stylewright.training.densities import Normal

    usual, far, wide = (axis_of(law) for law in (Normal(-6, 2), Normal(-20, 0.1), Normal(0, 10)))
    assert (usual.low, usual.high) == (-14, 8)
    assert far.low <= -21 and wide.low < -30 and wide.high > 30
    for axis in (usual, far, wide):
        assert 4 <= len(axis.ticks) <= 8 and all(axis.low <= tick <= axis.high for tick in axis.ticks)
