import json

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
    assert (workplace / files[0]).read_bytes() == before
    drawing = ["generate", "--adapter", "merged.safetensors", "--prompt", "star", "--size", "32x32"]
    assert run([*drawing, "--json"]) == 0 and json.loads(capsys.readouterr().out)["pictures"]
    assert run([*drawing, "--guidance", "3"]) == 1 and "one-step student" in capsys.readouterr().err
    assert run(["merge", *files, "no.safetensors", "--weight", "2"]) == 1
    assert "from 0 to 1" in capsys.readouterr().err
