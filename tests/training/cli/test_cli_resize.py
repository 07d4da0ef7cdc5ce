"""``stylewright resize``."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylewright.training.cli.app import run


@pytest.fixture
def file(tmp_path):
    draw, name = torch.Generator().manual_seed(0), "lora_unet_double_blocks_0_img_attn_proj"
    up = torch.randn(16, 4, generator=draw) * torch.tensor([10.0, 1.0, 0.1, 0.01])
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": torch.eye(4, 16)}
    save_file(tensors, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


@pytest.mark.parametrize(
    ("rule", "rank"), [(["--rank", "3"], 3), (["--energy", "0.9"], 1), (["--ratio", "200"], 3),
                       (["--ratio", "200", "--rank", "2"], 2)]
)  # fmt: skip
def test_the_file_has_the_rank(rule, rank, file, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert run(["resize", str(file), str(out), *rule, "--json"]) == 0
    assert {tuple(t.shape) for key, t in load_file(out).items() if "alpha" not in key} == {(16, rank), (rank, 16)}
    assert list(json.loads(capsys.readouterr().out)["ranks"].values()) == [rank]


@pytest.mark.parametrize("rule", [[], ["--rank", "0"], ["--energy", "0.5", "--ratio", "3"]])
def test_rules_that_say_nothing_are_errors(rule, file, tmp_path, capsys):
    assert run(["resize", str(file), str(tmp_path / "small.safetensors"), *rule]) == 1
    assert "expected" in capsys.readouterr().err
