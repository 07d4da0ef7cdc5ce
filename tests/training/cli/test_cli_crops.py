"""``stylewright crops``: a folder that training reads."""

import json

import pytest
import torch
from PIL import Image

from stylewright.training.cli.app import run
from stylewright.training.data.items import read_folder
from stylewright.training.embedded.renderer import Style
from stylewright.training.embedded.several import several

SCENE = several([3, 9], Style.named("ocean", "flat", "solid", "crisp"), torch.Generator().manual_seed(0))
PHRASES = ["--prompt", "star and house in ocean style", "--content", "star", "--content", "house", "--style", "ocean"]


@pytest.fixture
def files(tmp_path):
    """The picture, and masks of its subjects."""
    pixels = (SCENE.picture.movedim(0, -1) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    for name, (left, top, right, bottom) in zip(SCENE.subjects, SCENE.boxes.tolist(), strict=True):
        mask = Image.new("L", (128, 128))
        mask.paste(255, (left, top, right, bottom))
        mask.save(tmp_path / f"{name}.png")
    return tmp_path


def test_masks_make_a_folder_that_is_trained_on(files, capsys):
    masks = [part for name in SCENE.subjects for part in ("--mask", f"{name}={files / name}.png")]
    assert run(["crops", str(files / "picture.png"), str(files / "out"), *PHRASES, *masks, "--json"]) == 0
    items = read_folder(files / "out")
    assert [item.caption for item in items[:2]] == ["star and house in ocean style", "star in ocean style"]
    assert items[0].repeats / sum(item.repeats for item in items) == pytest.approx(0.4)
    assert len(items) == 9 and (files / "out-found.png").is_file()
    assert set(json.loads(capsys.readouterr().out)["found"]) == {"star", "house"}


def test_the_adapter_of_a_folder_knows_its_style_phrase(files, capsys):
    masks = [part for name in SCENE.subjects for part in ("--mask", f"{name}={files / name}.png")]
    both = [*PHRASES[:1], "star and house in ocean flat style", *PHRASES[2:], "--style", "flat"]
    assert run(["crops", str(files / "picture.png"), str(files / "out"), *both, *masks, "--variants", "1"]) == 0
    small = ["--resolution", "64", "--rank", "1", "--steps", "1", "--accumulation", "1"]
    asked = ["train", "--images", str(files / "out"), "--caption-mode", "full", "--out", str(files / "run")]
    assert run([*asked, *small]) == 0
    assert run(["resume", str(files / "run"), "--steps", "2"]) == 0  # its crops are of two phrases
    capsys.readouterr()
    assert run(["inspect", str(files / "run" / "adapter.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["style_phrase"] == "ocean"


@pytest.mark.parametrize("by", ["attention", "prediction error"])
def test_a_model_finds_what_has_no_mask(by, files, capsys):
    asked = ["crops", str(files / "picture.png"), str(files / "out"), *PHRASES, "--variants", "1", "--locate-by", by]
    assert run(asked) == 0
    assert "star: " in capsys.readouterr().out and len(read_folder(files / "out")) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mask", "star"], "expected PHRASE=FILE"),
        (["--mask", "star=a.png", "--mask", "star=b.png"], "--mask names 'star' twice: each phrase has one mask"),
        (["--resolution", "0"], "the resolution is 0: expected pixels"),
        (["--content", "boat"], "no part of the prompt: 'boat'"),
        (["--locate-by", "luck"], "cannot be located by 'luck': expected one of attention, prediction error"),
    ],
)
def test_mistakes_are_named(more, message, files, capsys):
    assert run(["crops", str(files / "picture.png"), str(files / "out"), *PHRASES, *more]) == 1
    assert message in capsys.readouterr().err and not (files / "out").exists()
