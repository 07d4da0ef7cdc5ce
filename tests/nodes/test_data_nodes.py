"""Style Dataset and Noise Level Density as their graphs call them."""

import json
import math

import pytest
import torch

pytestmark = pytest.mark.comfy

LINKED = "[from the images input]"
ENCODED = {"images": [torch.rand(1, 8, 8, 3)], "captions": [""], "conditioning": [[[torch.rand(1, 2, 3), {}]]]}


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
    colours, alpha = images[1][0, ..., :3].movedim(-1, 0), images[1][0, ..., 3]
    assert torch.equal(made.items[2].image, colours * alpha + (1 - alpha)), "transparency is over white, as of files"
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


def test_a_list_s_pictures_in_other_folders_are_noticed_when_they_change(input_folder):
    from stylewright.nodes.dataset import StyleDatasetNode

    (input_folder.parent / "more").mkdir()
    save_picture(input_folder.parent / "more" / "two.png")
    (input_folder / "list.jsonl").write_text('{"file": "../more/two.png", "caption": "a card", "repeats": 3}')
    made, _ = dataset(folder=["cats"], captions=[""], repeats=[2])
    assert made.items[0].repeats == 6
    before = StyleDatasetNode.fingerprint_inputs(folder=["cats"])
    save_picture(input_folder.parent / "more" / "two.png", (400, 240))
    assert StyleDatasetNode.fingerprint_inputs(folder=["cats"]) != before


def test_a_folder_may_bring_its_style_phrase(input_folder):
    line = {"file": "one.png", "caption": "a card in ink style", "style_phrase": "ink"}
    save_picture(input_folder / "one.png")
    (input_folder / "list.jsonl").write_text(json.dumps(line))
    made, _ = dataset(folder=["cats"], captions=[""], style_phrase=[""], caption_mode=["full"])
    assert made.style_phrase == "ink"


def load_image(path, folder):
    """What ComfyUI's own loader gives: an IMAGE, and a MASK that is white where the picture is transparent."""
    import nodes

    path.rename(folder / path.name)
    return nodes.LoadImage().load_image(path.name)


def test_the_mask_of_load_image_means_what_a_user_means(input_folder, tmp_path):
    from PIL import Image

    save_picture(tmp_path / "whole.png")
    whole, none = load_image(tmp_path / "whole.png", input_folder.parent)
    assert none.shape[-2:] == (64, 64)
    assert dataset(images=[whole], masks=[none])[0].items[0].mask is None
    assert dataset(images=[whole], masks=[none], invert_masks=[True])[0].items[0].mask is None

    painted = Image.new("RGBA", (40, 24), (200, 30, 60, 255))
    painted.paste((200, 30, 60, 0), (0, 0, 10, 24))  # the mask editor makes transparent what is painted
    painted.save(tmp_path / "painted.png")
    image, mask = load_image(tmp_path / "painted.png", input_folder.parent)
    learned = dataset(images=[image], masks=[mask])[0].items[0].mask
    assert learned[:, :10].min() == 1 and learned[:, 10:].max() == 0
    opaque = dataset(images=[image], masks=[mask], invert_masks=[True])[0].items[0].mask
    assert torch.equal(opaque, 1 - learned)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_any_channels_have_three(channels):
    image = torch.rand(1, 20, 30, channels)
    if channels in (2, 4):
        image[..., -1] = 1
    (item,) = dataset(images=[image])[0].items
    assert item.image.shape == (3, 20, 30)
    assert torch.equal(item.image[0], image[0, ..., 0])


@pytest.mark.parametrize("shape", [(2, 10, 15), (2, 1, 10, 15), (2, 10, 15, 1), (2, 20, 30)])
def test_masks_of_one_shape_with_their_pictures_are_resized(shape):
    mask = torch.ones(shape)
    made, _ = dataset(images=[torch.rand(2, 20, 30, 3)], masks=[mask])
    assert all(item.mask.shape[-2:] in ((10, 15), (20, 30)) for item in made.items)


def test_what_a_dataset_says_of_its_pictures_is_on_each():
    made, text = dataset(
        images=[torch.rand(2, 24, 40, 3)], captions=["a cat, red, old"], repeats=[3], more_resolutions=["128, 256 64"],
        caption_orders=[4], keep_tags=[1],
    )  # fmt: skip
    concept = made.items[1].concept
    assert concept.resolutions == (256, 128, 64)
    assert (concept.orders, concept.keep, concept.role, made.items[0].repeats) == (4, 1, "style", 3)
    assert text == "\n".join(["a cat, red, old in watercolor painting style"] * 2)
    plain, text = dataset(images=[torch.rand(1, 24, 40, 3)], caption_mode=["plain"])
    assert text == "a cat" and plain.items[0].concept.caption_mode == "plain"


def test_conditioning_stands_for_captions():
    entry = [torch.rand(1, 4, 8), {"pooled_output": torch.rand(1, 8), "guidance": 2.0}]
    other = [torch.rand(2, 4, 8), {"pooled_output": torch.rand(2, 8)}]
    images = [torch.rand(3, 24, 40, 3)]
    one, text = dataset(images=images, captions=[""], conditioning=[[entry]])
    assert len({item.caption for item in one.items}) == 1 and text.count("[conditioning ") == 3
    (answer,) = one.answers.values()
    assert torch.equal(answer["cross_attn"], entry[0]) and answer["guidance"] == 2.0
    for given in ([[entry, other]], [[entry], [other]]):  # joined, and as a list; a batch is one a picture
        each, _ = dataset(images=images, captions=[""], conditioning=given)
        rows = [each.answers[item.caption] for item in each.items]
        assert torch.equal(rows[0]["cross_attn"], entry[0])
        assert torch.equal(rows[2]["cross_attn"], other[0][1:]) and rows[2]["pooled_output"].shape == (1, 8)
    assert one.items[0].concept.caption_mode == "plain"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no pictures"),
        ({"images": [torch.rand(2, 8, 8, 3)], "captions": ["a\nb\nc"]}, "2 pictures and 3 captions"),
        ({"images": [torch.rand(1, 8, 8, 3)], "captions": [" \n"]}, "no captions"),
        ({"images": [torch.rand(1, 8, 8, 3)], "style_phrase": [" "]}, "style phrase"),
        ({"images": [torch.rand(1, 8, 8, 3)], "caption_mode": ["full"]}, "missing from 1 of 1 captions"),
        ({"images": [torch.rand(2, 8, 8, 3)], "masks": [torch.ones(1, 8, 8)]}, "2 pictures and 1 masks"),
        ({"images": [torch.rand(2, 8, 8, 3)], "masks": [torch.ones(2, 8, 30)]}, "30x8, the picture 8x8"),
        ({"images": [torch.rand(1, 8, 8, 3)], "masks": [torch.zeros(1, 8, 8)]}, "black all over"),
        ({"images": [torch.rand(1, 8, 8, 3)], "masks": [torch.rand(1, 2, 8, 8)]}, "no masks"),
        ({"images": [torch.rand(1, 8, 8, 5)]}, "no pictures: expected"),
        ({"images": [torch.rand(8, 8, 3)]}, "no pictures: expected"),
        ({"images": [torch.rand(0, 8, 8, 3)]}, "no pictures"),
        ({"images": [torch.rand(1, 0, 8, 3)]}, "no pixels"),
        ({"images": [torch.full((1, 8, 8, 3), torch.nan)]}, "NaN"),
        ({"images": [torch.full((1, 8, 8, 3), 200.0)]}, "values from 200"),
        ({"images": [torch.full((1, 8, 8, 3), 200, dtype=torch.uint8)]}, "divide bytes by 255"),
        ({"images": [torch.rand(2, 8, 8, 3)], "captions": ["a cat", ""]}, "without captions: picture 2"),
        ({"images": [torch.rand(1, 8, 8, 3)], "more_resolutions": ["512, big"]}, "more_resolutions holds big"),
        ({"images": [torch.rand(1, 8, 8, 3)], "more_resolutions": ["16"]}, "from 64 to 4096"),
        ({"images": [torch.rand(1, 8, 8, 3)], "conditioning": [[[torch.rand(1, 2, 3), {}]]]}, "'captions' would be ig"),
        ({**ENCODED, "caption_orders": [3]}, "no tags to shuffle"),
        ({**ENCODED, "conditioning": [[]]}, "conditioning is empty"),
        ({**ENCODED, "conditioning": [[[torch.rand(2, 2, 3), {}]]]}, "1 pictures and 2 captions"),
        ({**ENCODED, "conditioning": [[[torch.full((1, 2, 3), torch.nan), {}]]]}, "NaN"),
        ({**ENCODED, "conditioning": [[[torch.rand(1, 2, 3), {"area": (1, 1, 0, 0)}]]]}, "Set Area"),
        ({**ENCODED, "conditioning": [[[torch.rand(1, 2, 3), {"mask": torch.ones(1, 2, 2)}]]]}, "Set Mask"),
        ({**ENCODED, "conditioning": [[[torch.rand(1, 2, 3), {"control": object()}]]]}, "ControlNet"),
        ({**ENCODED, "conditioning": [[[torch.rand(1, 2, 3), {"hooks": object()}]]]}, "hooks"),
        ({**ENCODED, "conditioning": [[[torch.rand(1, 2, 3), {"start_percent": 0.5}]]]}, "TimestepRange"),
        ({**ENCODED, "images": None, "folder": ["cats"]}, "conditioning would be ignored"),
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
    from stylewright.training.density_presets import DensityConfig, build_density

    law = build_density(DensityConfig(mu=-6.0, sigma=2.0), (-math.inf, math.inf), 4096)
    axis = axis_of(law)
    points = curve(law, axis)
    top = min(range(len(points)), key=lambda i: points[i][1])
    log_snr = axis.low + top / len(points) * (axis.high - axis.low)
    assert log_snr == pytest.approx(-6.0, abs=0.05)
    assert len(points) == (RIGHT - LEFT) * 3


def test_the_resolution_rule_and_a_model_s_range_show(tiny):
    from stylewright.nodes.density_picture import summary
    from stylewright.training.density_presets import DensityConfig, build_density, style_window

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
