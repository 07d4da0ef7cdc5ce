import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from stylewright.training.data.images import (
    check_mask,
    check_pixels,
    corner,
    fit,
    load_picture,
    open_alpha,
    open_image,
    open_mask,
)

H, W = 5, 8


def colours(seed=0, shape=(H, W, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def expected(array):
    return torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)


def test_a_plain_picture_is_its_bytes(tmp_path):
    array = colours()
    pixels = open_image(saved(tmp_path, Image.fromarray(array)))
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected(array))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(tmp_path, orientation):
    array = colours()
    # What a camera stores, by definition of the tag: the inverse of what a viewer has to do.
    stored = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, 1),
        7: np.rot90(array, 2).transpose(1, 0, 2),
        8: np.rot90(array, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert torch.equal(open_image(path), expected(array))


def test_transparency_lies_over_white(tmp_path):
    array = colours(shape=(H, W, 4))
    pixels = open_image(saved(tmp_path, Image.fromarray(array, "RGBA")))
    rgb, alpha = expected(array)[:3], expected(array)[3:]
    assert torch.allclose(pixels, rgb * alpha + 1 - alpha)
    assert torch.equal(open_alpha(tmp_path / "a.png"), alpha)


def test_invisible_colours_do_not_bleed_when_resized():
    # Black under full transparency beside opaque red: a resize before compositing would darken the border.
    red_on_white = torch.ones(3, 4, 8)
    red_on_white[1:, :, :4] = 0
    small = fit(red_on_white, 2, 4)
    assert small[0].min() > 0.999


def test_a_palette_with_transparency(tmp_path):
    image = Image.new("P", (W, H), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((2, 1), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = open_image(saved(tmp_path, image, transparency=b"\x33\xff"))
    # One fifth of (10, 20, 30) over white.
    assert torch.allclose(pixels[:, 1, 2] * 255, torch.tensor([206.0, 208, 210]))
    assert torch.allclose(pixels[:, 0, 0] * 255, torch.tensor([200.0, 100, 50]))


def test_a_transparent_colour_without_an_alpha_channel(tmp_path):
    image = Image.new("RGB", (W, H), (9, 8, 7))
    image.putpixel((3, 2), (1, 2, 3))
    pixels = open_image(saved(tmp_path, image, transparency=(1, 2, 3)))
    assert pixels[:, 2, 3].tolist() == [1, 1, 1]
    assert torch.allclose(pixels[:, 0, 0] * 255, torch.tensor([9.0, 8, 7]))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "CMYK", "P"])
def test_other_modes_keep_their_brightness(tmp_path, mode):
    grey = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (H, W // 2)))
    path = saved(tmp_path, grey.convert(mode), "a.tif" if mode == "CMYK" else "a.png")
    assert torch.equal(open_image(path), torch.tensor([0.0, 1.0]).repeat(3, H, W // 2))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)
    pixels = open_image(saved(tmp_path, Image.fromarray(values)))
    assert torch.allclose(pixels, torch.from_numpy(values.astype(np.float32) / 65535).expand(3, H, W))


def test_floats_have_to_be_in_range(tmp_path):
    ramp = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    assert torch.equal(open_image(saved(tmp_path, Image.fromarray(ramp), "a.tif"))[1], torch.from_numpy(ramp))
    path = saved(tmp_path, Image.fromarray(ramp * 255), "b.tif")
    with pytest.raises(ValueError, match=r"b\.tif.*leave the range 0 to 1"):
        open_image(path)


def test_a_colour_profile_is_honoured(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same profile with red and blue exchanged: its pictures mean the same with these channels exchanged.
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    image = Image.fromarray(colours())
    plain = open_image(saved(tmp_path, image))
    tagged = open_image(saved(tmp_path, image, icc_profile=srgb))
    assert torch.allclose(tagged, plain, atol=1.01 / 255)
    other = open_image(saved(tmp_path, image, icc_profile=swapped))
    assert torch.allclose(other, plain[[2, 1, 0]], atol=2.01 / 255)


def test_a_broken_profile_is_ignored_with_a_warning(tmp_path, caplog):
    path = saved(tmp_path, Image.fromarray(colours()), icc_profile=b"no profile")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(open_image(path), expected(colours()))
    assert "a.png" in caplog.text


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("L", (W, H), value) for value in (0, 255)]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).max() == 0


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no picture .*gone\.png"):
        open_image(tmp_path / "gone.png")
    path = saved(tmp_path, Image.fromarray(colours(shape=(64, 64, 3))), "cut.jpg")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"Cannot read the picture .*cut\.jpg"):
        open_image(path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        open_image(tmp_path / "text.png")


def test_mask_files_are_read_by_brightness(tmp_path):
    array = colours(shape=(H, W))
    mask = open_mask(saved(tmp_path, Image.fromarray(array)))
    assert torch.allclose(mask, torch.from_numpy(array.astype(np.float32) / 255)[None], atol=1e-6)


def test_a_picture_that_is_its_own_mask(tmp_path):
    array = colours(shape=(2 * H, 2 * W, 4))
    path = saved(tmp_path, Image.fromarray(array, "RGBA"))
    assert torch.equal(load_picture(path, path, "a").mask, expected(array)[3:])
    opaque = saved(tmp_path, Image.fromarray(colours(shape=(2 * H, 2 * W, 3))), "b.png")
    assert load_picture(opaque, opaque, "b").mask is None


def test_masks_have_to_fit():
    height, width = 10, 16
    pixels = torch.rand(3, height, width)
    assert load_picture(pixels, torch.ones(height, width), "a").mask is None
    assert load_picture(pixels, torch.eye(width)[:height], "a").mask.shape == (1, height, width)
    with pytest.raises(ValueError, match="mask of cat is 10x16, the picture 16x10"):
        load_picture(pixels, torch.ones(width, height), "cat")
    with pytest.raises(ValueError, match="mask of cat is black"):
        load_picture(pixels, torch.zeros(height, width), "cat")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(H, W, 3), r"cat has the shape \(5, 8, 3\).*channels come first"),
        (torch.rand(4, H, W), r"cat has the shape \(4, 5, 8\), expected \(3, height, width\)$"),
        (torch.rand(1, 3, H, W), "cat has the shape"),
        (torch.rand(3, 0, W), "cat has no pixels"),
        (torch.zeros(3, H, W, dtype=torch.uint8), "divide bytes by 255"),
        (torch.full((3, H, W), float("nan")), "cat contains NaN"),
        (torch.rand(3, H, W) * 255, "cat has values from .* expected 0 to 1"),
        (torch.rand(3, H, W) * 2 - 1.5, "cat has values from"),
    ],
)
def test_wrong_pixels_are_named(pixels, message):
    with pytest.raises(ValueError, match=message):
        check_pixels(pixels, "cat")


def test_a_slight_overshoot_is_clamped_and_the_tensor_left_alone():
    pixels = torch.rand(3, H, W, dtype=torch.float64) * 1.06 - 0.03
    before = pixels.clone()
    checked = check_pixels(pixels, "cat")
    assert checked.dtype == torch.float32
    assert checked.min() >= 0 and checked.max() <= 1
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("mask", [torch.ones(3, H, W), torch.ones(H), torch.ones(H, W) * 2, torch.ones(0, W)])
def test_wrong_masks_are_named(mask):
    with pytest.raises(ValueError, match="mask of cat"):
        check_mask(mask, "cat")


def test_a_fitting_picture_is_only_cut():
    pixels = torch.rand(3, H, W)
    assert torch.equal(fit(pixels, H, W), pixels)
    assert torch.equal(fit(pixels, H, 4), pixels[:, :, 2:6])
    assert torch.equal(fit(pixels, 3, W), pixels[:, 1:4])
    assert (corner(H, W, H, 4), corner(H, W, 3, W)) == ((0, 2), (1, 0))


@pytest.mark.parametrize("size", [(7, 3), (16, 16), (30, 41), (100, 10)])
def test_the_result_has_the_size_asked_for(size):
    assert fit(torch.rand(3, 31, 44), *size).shape == (3, *size)


def test_shrinking_does_not_alias():
    # Stripes finer than the result's pixels have to become grey, whichever pixels a naive method would pick.
    stripes = (torch.arange(128) % 3 == 0).float().expand(3, 96, 128)
    small = fit(stripes, 12, 16)
    assert (small[:, :, 1:-1] - 1 / 3).abs().max() < 0.02


def test_resampling_keeps_a_ramp_and_does_not_shift_it():
    ramp = ((torch.arange(128) + 0.5) / 128).expand(3, 96, 128)
    small = fit(ramp, 12, 16)
    assert torch.allclose(small[0, 5, 2:-2], ((torch.arange(16) + 0.5) / 16)[2:-2], atol=1e-3)


def test_resampling_stays_in_range():
    grown = fit((torch.arange(20) % 7 > 3).float().expand(3, 15, 20), 33, 44)
    assert grown.min() == 0 and grown.max() == 1


def test_a_mask_of_the_picture_s_shape_is_resized_to_it():
    mask = torch.zeros(10, 15)
    mask[:, 5:] = 1
    picture = load_picture(torch.rand(3, 20, 30), mask, "it")
    assert picture.mask.shape == (1, 20, 30)
    assert picture.mask[..., :9].max() == 0 and picture.mask[..., 11:].min() == 1
    # A side that was rounded on the way is no other shape; a turned mask is.
    assert load_picture(torch.rand(3, 333, 500), torch.ones(21, 32), "it").mask is None
    with pytest.raises(ValueError, match="mask of it is 20x30, the picture 30x20"):
        load_picture(torch.rand(3, 20, 30), torch.ones(30, 20), "it")


@pytest.mark.parametrize("size", [(1, 1), (1, 400_000), (400_000, 1), (3, 5000)])
def test_pictures_of_any_shape_fit_without_filling_the_memory(size):
    values = torch.rand(3, *size)
    for height, width in ((64, 64), (32, 128), (128, 32)):
        cut = fit(values, height, width)
        assert cut.shape == (3, height, width) and cut.min() >= 0 and cut.max() <= 1
    assert torch.equal(fit(torch.full((1, *size), 0.5), 64, 64).round(decimals=4), torch.full((1, 64, 64), 0.5))


def test_what_is_cut_off_before_resizing_leaves_the_rest_as_it_is():
    """The middle of a long picture is the same whether its far ends are there or not."""
    values = torch.rand(1, 40, 40 * 30)
    middle = values[..., 40 * 10 : 40 * 20]
    torch.testing.assert_close(fit(values, 20, 30), fit(middle, 20, 30), atol=1e-5, rtol=0)
