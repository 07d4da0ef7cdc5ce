import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stylewright.training.embedded.oracle import HEADS, STYLE_HEADS, Oracle, load_oracle, score, subject_leakage
from stylewright.training.embedded.pretrain.oracle import accuracy, any_scene
from stylewright.training.embedded.renderer import Style, render


class Knowing(nn.Module):
    """Answers with what is written into each picture's first pixels, in the order of HEADS."""

    def forward(self, pictures):
        return {
            name: nn.functional.one_hot(pictures[:, 0, 0, i].long(), classes).float()
            for i, (name, classes) in enumerate(HEADS.items())
        }


def showing(*rows):
    """Pictures that show these attributes, (b, 3, 128, 128)."""
    pictures = torch.zeros(len(rows), 3, 128, 128)
    pictures[:, 0, 0, : len(HEADS)] = torch.tensor(rows).float()
    return pictures


def test_scores_are_what_is_right():
    pictures = showing((0, 5, 2, 1, 0), (1, 5, 2, 1, 0), (1, 4, 6, 0, 2))
    styles = [Style(5, 2, 1, 0), Style(5, 3, 1, 2), Style(15, 0, 3, 1)]
    scores = score(Knowing(), pictures, torch.tensor([0, 2, 1]), styles)
    assert scores.subject.tolist() == [True, False, True]
    assert {name: right.tolist() for name, right in scores.style.items()} == {
        "palette": [True, True, False],
        "ground": [True, False, False],
        "fill": [True, True, False],
        "edge": [True, False, False],
    }
    assert scores.style_share.tolist() == [1.0, 0.5, 0.0]
    assert scores.whole_style.tolist() == [True, False, False]


def test_leakage_is_the_reference_s_subject_where_another_was_asked_for():
    """Subject 3 is what the reference shows; a logit of 1 among zeros is a probability of e / (e + 9)."""
    pictures = showing((3, 0, 0, 0, 0), (3, 0, 0, 0, 0), (1, 0, 0, 0, 0))
    likely, unlikely = torch.e / (torch.e + 9), 1 / (torch.e + 9)
    leaked = subject_leakage(Knowing(), pictures, torch.tensor([3, 1, 1]), [3])
    assert leaked.tolist() == pytest.approx([likely, unlikely])
    leaked = subject_leakage(Knowing(), pictures, torch.tensor([3, 1, 1]), [3, 5])
    assert leaked.tolist() == pytest.approx([unlikely, likely, unlikely])


@pytest.mark.parametrize("size", [64, 128, 256])
def test_any_size_is_seen_at_half_the_usual_resolution(size):
    answers = Oracle()(torch.rand(2, 3, size, size))
    assert {name: tuple(logits.shape) for name, logits in answers.items()} == {
        name: (2, classes) for name, classes in HEADS.items()
    }
    assert list(STYLE_HEADS) == ["palette", "ground", "fill", "edge"]


def test_loading_gives_back_what_was_saved_and_leaves_the_generator_alone(tmp_path):
    oracle = Oracle()
    save_file({key: value.bfloat16() for key, value in oracle.state_dict().items()}, tmp_path / "oracle.safetensors")
    before = torch.get_rng_state()
    loaded = load_oracle(tmp_path / "oracle.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for key, value in oracle.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.bfloat16().float())


def test_files_that_are_missing_or_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the oracle in .*oracle\.safetensors"):
        load_oracle(tmp_path / "oracle.safetensors")
    save_file({"body.weight": torch.zeros(2)}, tmp_path / "oracle.safetensors")
    with pytest.raises(ValueError, match="cannot read the oracle in"):
        load_oracle(tmp_path / "oracle.safetensors")


def test_the_shipped_one_reads_fresh_renders(shipped_oracle):
    shares = accuracy(shipped_oracle, seed=123, n=400)
    assert shares.keys() == HEADS.keys()
    assert min(shares.values()) > 0.97, shares


def test_the_shipped_one_agrees_with_the_renderer(shipped_oracle):
    """The same through ``score``, which is what the figures are made of."""
    scene = any_scene(200, 124)
    rows = zip(*(getattr(scene, name).tolist() for name in STYLE_HEADS), strict=True)
    scores = score(shipped_oracle, render(scene), scene.subject, [Style(*row) for row in rows])
    assert scores.subject.float().mean() > 0.97
    assert scores.style_share.mean() > 0.97
    scores = score(shipped_oracle, render(scene), (scene.subject + 1) % 10, [Style(0, 0, 0, 0)] * 200)
    assert scores.subject.float().mean() < 0.05


def test_the_shipped_one_sees_what_leaks(shipped_oracle):
    scene = any_scene(200, 125)
    asked = torch.where(scene.subject == 3, 0, scene.subject)  # stars were not asked for
    leaked = subject_leakage(shipped_oracle, render(scene), asked, [3])
    stars = scene.subject == 3
    assert leaked[stars].min() > 0.5 > leaked[~stars].max() and leaked[~stars].mean() < 0.02
