import json

import torch
from PIL import Image
from safetensors.torch import load_file

from stylewright.training.cli.app import run

SMALL = ["distill", "--resolution", "32", "--batch-size", "2", "--fake-rank", "2", "--steps", "1"]
SMALL += ["--learning-rate", "1e-2"]


def test_two_students_become_one_that_draws(workplace, capsys):
    for name, rank in (("a", "2"), ("b", "3")):
        assert run([*SMALL, "--rank", rank, "--seed", rank, "--ema-decay", "0", "--out", name]) == 0
    files = [f"{name}/adapter.safetensors" for name in "ab"]
    capsys.readouterr()
    assert run(["merge", *files, "merged.safetensors", "--weight", "0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made"].endswith("layers of rank 5")
    assert run(["merge", *files, "small.safetensors", "--rank", "2"]) == 0
    assert sum(t.numel() for t in load_file("small.safetensors").values()) < sum(
        t.numel() for t in load_file("merged.safetensors").values()
    )
    capsys.readouterr()
    before = (workplace / files[0]).read_bytes()
    for there in (files[0], "merged.safetensors"):
        assert run(["merge", *files, there]) == 1
        assert "is there already" in capsys.readouterr().err
    assert run(["merge", *files, "merged.txt"]) == 1
    assert "ends in .safetensors" in capsys.readouterr().err and not (workplace / "merged.txt").exists()
    assert (workplace / files[0]).read_bytes() == before
    drawing = ["generate", "--adapter", "merged.safetensors", "--prompt", "star", "--size", "32x32"]
    assert run([*drawing, "--json"]) == 0 and json.loads(capsys.readouterr().out)["pictures"]
    assert run([*drawing, "--guidance", "3"]) == 1 and "one-step student" in capsys.readouterr().err
    assert run(["merge", *files, "no.safetensors", "--weight", "2"]) == 1
    assert "from 0 to 1" in capsys.readouterr().err


def test_all_weights_and_an_adapter_with_their_model_become_all_weights_that_draw(workplace, capsys):
    """The merge of SwiftBrush v2: its first student learns all weights, its second a LoRA."""
    options = [*SMALL, "--ema-decay", "0", "--steps", "3"]
    assert run([*options, "--full", "--out", "a"]) == 0
    assert run([*options, "--rank", "2", "--out", "b"]) == 0
    files = ["a/student.safetensors", "b/adapter.safetensors"]
    capsys.readouterr()
    assert run(["merge", *files, "m.safetensors"]) == 1
    assert "with --model (its file says embedded)" in capsys.readouterr().err
    for share in ("0", "0.25", "1"):
        assert run(["merge", *files, f"{share}.safetensors", "--weight", share, "--model", "embedded", "--json"]) == 0
    whole, between, adapter = (load_file(f"{share}.safetensors") for share in ("1", "0.25", "0"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(files[0]).items())
    assert any(not torch.equal(whole[name], tensor) for name, tensor in adapter.items())
    for name, tensor in between.items():
        torch.testing.assert_close(tensor, 0.25 * whole[name] + 0.75 * adapter[name])
    capsys.readouterr()

    def drawn(file):
        asked = ["--prompt", "star", "--size", "32x32", "--out", "drawn", "--json"]
        assert run(["generate", "--adapter", file, *asked]) == 0
        picture = json.loads(capsys.readouterr().out)["pictures"][0]["file"]
        with Image.open(picture) as image:
            return torch.tensor(list(image.tobytes()), dtype=torch.float32)

    torch.testing.assert_close(drawn("0.safetensors"), drawn(files[1]), atol=1, rtol=0)
    assert drawn("0.25.safetensors").isfinite().all()
    assert run(["inspect", "0.25.safetensors", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["method"], said["one_step"], said["base_model"]) == ("full", "at sigma 1", "embedded")
    for more, words in (
        (["--model", "embedded", "--rank", "2"], "leave --rank out"),
        (["--components", "."], "without --model"),
        (["--model", "nowhere"], "no model at nowhere"),
    ):
        assert run(["merge", *files, "no.safetensors", *more]) == 1 and words in capsys.readouterr().err
    assert not (workplace / "no.safetensors").exists()
