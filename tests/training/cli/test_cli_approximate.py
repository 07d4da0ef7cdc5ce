"""``stylewright approximate`` and ``stylewright imitate``: what they refuse, before any work."""

import pytest
import torch
from safetensors.torch import save_file

from stylewright.training.cli.app import run


@pytest.fixture
def lora(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{name}.lora_up.weight": torch.ones(16, 4), f"{name}.lora_down.weight": torch.eye(4, 16)}
    save_file(tensors, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def test_a_lora_needs_no_approximation(lora, tmp_path, capsys):
    assert run(["approximate", str(lora), str(tmp_path / "out.safetensors"), "--prompt", "star"]) == 1
    assert "is a change of weights already: it loads everywhere as it is" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_bottleneck_is_named_as_what_it_is(tmp_path, capsys):
    from stylewright.training.formats.adapters import save_adapter
    from stylewright.training.formats.metadata import AdapterMetadata, build_metadata

    name, path = "transformer_blocks.0.attn.to_k", tmp_path / "one.safetensors"
    state = {f"{name}.bottleneck_down": torch.ones(2, 16), f"{name}.bottleneck_up": torch.ones(16, 2)}
    save_adapter(path, state, build_metadata(AdapterMetadata("flux", "bottleneck", 2)))
    assert run(["approximate", str(path), str(tmp_path / "out.safetensors"), "--prompt", "star"]) == 1
    assert "is a bottleneck adapter, and this is for StyleInject: no LoRA is known for it" in capsys.readouterr().err


def test_nothing_is_overwritten(lora, tmp_path, capsys):
    (tmp_path / "out.safetensors").write_text("mine")
    assert run(["approximate", str(lora), str(tmp_path / "out.safetensors"), "--prompt", "star"]) == 1
    assert "out.safetensors is there already: name a file to make" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_text() == "mine"


@pytest.mark.parametrize("model", ["embedded", "there/../here"])
def test_a_model_has_nothing_to_learn_from_itself(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = "here" if "here" in model else model
    assert run(["imitate", teacher, "--model", model, "--prompt", "star", "--out", "run", "--steps", "1"]) == 1
    assert "there is nothing to learn" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_text_encoders_are_not_taught(lora, tmp_path, capsys):
    words = ["imitate", str(lora), "--prompt", "star", "--out", str(tmp_path / "run")]
    assert run([*words, "--text-encoder-learning-rate", "1e-5"]) == 1
    assert "expected 0, for the teacher and the model get the same prompts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
