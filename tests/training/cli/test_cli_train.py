import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylewright.training.cli import train as command
from stylewright.training.cli.app import run
from stylewright.training.cli.progress import patient_interrupt
from stylewright.training.formats.adapters import save_adapter
from stylewright.training.formats.metadata import AdapterMetadata, build_metadata

SMALL = ["--resolution", "64", "--accumulation", "1", "--rank", "2", "--style-phrase", "<v0>", "--images", "pictures"]


def trained(capsys, *arguments: str) -> dict:
    """What a successful command printed as JSON."""
    code = run([*arguments, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


def test_train_inspect_convert_and_generate(workplace, capsys):
    result = trained(capsys, "train", *SMALL, "--steps", "2", "--out", "run", "--seed", "5")
    assert result["steps"] == 2
    assert result["loss"] > 0
    assert sorted(path.name for path in (workplace / "run").glob("*.json*")) == [
        "config.json",
        "events.jsonl",
        "job.json",
        "plan.json",
    ]

    report = trained(capsys, "inspect", result["adapter"])
    assert (report["family"], report["method"], report["ranks"]) == ("flux", "lora", [2])
    assert report["style_phrase"] == "<v0>"

    trained(capsys, "convert", result["adapter"], "converted.safetensors", "--style", "comfyui")
    assert trained(capsys, "inspect", "converted.safetensors")["modules"] > 0

    drawn = trained(
        capsys, "generate", "--adapter", result["adapter"], "--prompt", "star", "--steps", "1", "--size", "64x32"
    )
    assert [picture["prompt"] for picture in drawn["pictures"]] == ["star in <v0> style"]
    from PIL import Image

    with Image.open(drawn["pictures"][0]["file"]) as picture:
        assert picture.size == (64, 32)
    small = ["--prompt", "star", "--steps", "1", "--size", "64x64", "--style-guidance", "2"]
    assert trained(capsys, "generate", "--adapter", result["adapter"], *small)["pictures"]
    assert run(["generate", *small]) == 1
    assert "give its file with --adapter" in capsys.readouterr().err
    assert run(["generate", "--prompt", "star", "--negative", "tree", "--guidance", "1"]) == 1
    assert "--negative has no effect" in capsys.readouterr().err


def test_text_says_where_the_results_are(workplace, capsys):
    assert run(["train", *SMALL, "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert str(Path("runs/pictures/adapter.safetensors")) in printed
    assert run(["train", *SMALL, "--steps", "1"]) == 0
    assert str(Path("runs/pictures-2/adapter.safetensors")) in capsys.readouterr().out


def test_a_file_and_flags_have_the_same_names(workplace, capsys):
    (workplace / "run.toml").write_text(
        'images = "pictures"\nstyle_phrase = "<v0>"\nresolution = 64\naccumulation = 1\nsteps = 5\n'
        "[adapter]\nrank = 4\n[density]\nmu = -4\n",
        encoding="utf-8",
    )
    assert trained(capsys, "train", "--config", "run.toml", "--steps", "1", "--rank", "2", "--out", "a")["steps"] == 1
    config = json.loads((workplace / "a" / "config.json").read_text(encoding="utf-8"))
    assert config["adapter"]["rank"] == 2
    assert config["density"]["mu"] == -4.0
    assert config["density"]["reference_tokens"] == 4096, "the embedded model carries the law to its own size"
    assert trained(capsys, "train", *SMALL, "--mu", "-4", "--steps", "1", "--out", "b")["steps"] == 1
    same = [load_file(workplace / name / "adapter.safetensors") for name in "ab"]
    assert all(same[0][key].equal(same[1][key]) for key in same[0])


def test_resume_equals_a_straight_run(workplace, capsys, monkeypatch):
    trained(capsys, "train", *SMALL, "--steps", "2", "--out", "parts")
    monkeypatch.chdir("/")
    assert trained(capsys, "resume", str(workplace / "parts"), "--steps", "4")["steps"] == 4
    monkeypatch.chdir(workplace)
    trained(capsys, "train", *SMALL, "--steps", "4", "--out", "whole")
    parts, whole = (load_file(workplace / name / "adapter.safetensors") for name in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    assert all(parts[key].equal(whole[key]) for key in parts)


def test_ctrl_c_saves_and_says_how_to_go_on(workplace, capsys, monkeypatch):
    def press(step):
        signal.raise_signal(signal.SIGINT)
        return torch.zeros(1, 3, 8, 8)

    arguments = [*SMALL, "--steps", "3", "--sample-every", "1", "--sample-prompts", "star", "--out", "run"]
    monkeypatch.setattr(command, "sampler", lambda host, options: press)
    assert run(["train", *arguments, "--report-every", "1", "--json"]) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "stylewright resume run" in printed.err
    assert len((workplace / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    monkeypatch.setattr(command, "sampler", lambda host, options: None)
    assert trained(capsys, "resume", "run")["steps"] == 3


def test_samples_are_drawn_in_the_style(workplace, capsys):
    trained(capsys, "train", *SMALL, "--steps", "1", "--sample-every", "1", "--sample-prompts", "tree", "--out", "run")
    assert len(list((workplace / "run" / "samples").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--images"]),
        (["--images", "nowhere"], ["nowhere"]),
        (["--images", "pictures"], ["style phrase"]),
        ([*SMALL, "--steps", "0"], ["steps", "0"]),
        ([*SMALL, "--repeats", "2", "--repeats", "3"], ["2 repeats for 1 folders"]),
        ([*SMALL, "--regularisation", "nowhere"], ["nowhere"]),
        ([*SMALL, "--prior-target", "nix"], ["nix", "base"]),
        ([*SMALL, "--prior-target", "base", "--caption-mode", "full"], ["without the style phrase"]),
        ([*SMALL, "--regularisation", "pictures", "--prior-share", "1"], ["share of samples", "1.0"]),
        ([*SMALL, "--rank", "4096"], ["4096"]),
        ([*SMALL, "--targets", "nothing.*"], ["nothing"]),
        ([*SMALL, "--branches", "4"], ["branches has no effect on lora", "the method styleinject"]),
        ([*SMALL, "--method", "bottleneck", "--injection", "f1"], ["injection has no effect on bottleneck"]),
        ([*SMALL, "--no-shared-bottleneck"], ["shared_bottleneck has no effect on lora"]),
        ([*SMALL, "--model", "nowhere"], ["nowhere"]),
        ([*SMALL, "--device", "abacus"], ["abacus"]),
        ([*SMALL, "--optimizer", "nix"], ["nix", "adamw"]),
        ([*SMALL, "--config", "nowhere.toml"], ["Cannot read the options in nowhere.toml"]),
        ([*SMALL, "--config", "pictures/star.txt"], ["star.txt", "TOML"]),
        ([*SMALL, "--config", "misspelled.toml"], ["learning_rat", "did you mean learning_rate"]),
    ],
    ids=lambda value: " ".join(map(str, value[-2:])),
)
def test_errors_come_before_anything_is_written(workplace, capsys, arguments, words):
    (workplace / "misspelled.toml").write_text("learning_rat = 1.0", encoding="utf-8")
    before = sorted(workplace.rglob("*"))
    assert run(["train", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(word in printed.err for word in words), printed.err
    assert sorted(path for path in workplace.rglob("*") if path.name != "runs") == before


def test_bad_targets_are_known_before_pictures_are_encoded(workplace, capsys, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr("stylewright.training.data.encoding.encode", forbidden)
    assert run(["train", *SMALL, "--rank", "4096"]) == 1
    assert "rank 4096 is larger" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_named(workplace, capsys):
    (workplace / "file").write_text("in the way", encoding="utf-8")
    assert run(["train", *SMALL, "--out", "file/run"]) == 1
    printed = capsys.readouterr().err
    assert "Cannot write into file/run" in printed.replace("\\", "/") and "cache" not in printed


def test_another_jobs_run_is_left_alone(workplace, capsys):
    trained(capsys, "train", *SMALL, "--steps", "1", "--out", "run")
    (workplace / "pictures").rename(workplace / "others")
    others = [argument.replace("pictures", "others") for argument in SMALL]
    assert run(["train", *others, "--steps", "1", "--out", "run"]) == 1
    assert "images was" in capsys.readouterr().err


def test_other_pictures_and_another_beginning_are_said_in_words(workplace, capsys):
    made = trained(capsys, "train", *SMALL, "--steps", "1", "--out", "run")["adapter"]
    assert run(["train", *SMALL, "--steps", "1", "--out", "run", "--init-adapter", made]) == 1
    assert "init_adapter was not given and is '" in capsys.readouterr().err
    (workplace / "pictures" / "star.txt").write_text("tree")
    assert run(["train", *SMALL, "--steps", "1", "--out", "run"]) == 1
    assert "the pictures, captions or masks are others. Continue it with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stated", "words"), [(True, "is an adapter for sdxl"), (False, "names of its layers, .* sdxl")]
)
@pytest.mark.parametrize(
    "use",
    [
        ["distill", "--init-adapter"],
        ["distill", "--teacher-adapter"],
        ["train", *SMALL, "--init-adapter"],
        ["generate", "--prompt", "star", "--adapter"],
    ],
    ids=lambda use: " ".join(use[:: len(use) - 1]),
)
def test_an_adapter_of_another_family_is_named_with_the_model(use, stated, words, workplace, capsys):
    layer = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 2048), f"{layer}.lora_B.weight": torch.ones(640, 2)}
    save_adapter(workplace / "style.safetensors", state, build_metadata(AdapterMetadata("sdxl", "lora", 2)), "kohya")
    if not stated:
        save_file(load_file("style.safetensors"), "style.safetensors")
    assert run([*use, "style.safetensors"]) == 1
    said = capsys.readouterr().err
    assert re.search(rf"style\.safetensors .*{words}, and the model embedded is of the family flux", said), said


def test_resume_refuses_what_is_no_run(workplace, capsys):
    assert run(["resume", "pictures"]) == 1
    assert "not the folder of a run" in capsys.readouterr().err
    assert run(["resume", "nowhere"]) == 1
    assert "nowhere is not the folder of a run" in (printed := capsys.readouterr().err) and "Errno" not in printed


def test_the_second_interrupt_does_not_wait(capsys):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with pytest.raises(KeyboardInterrupt), patient_interrupt() as check:
        signal.raise_signal(signal.SIGINT)
        assert "Ctrl-C again" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
        check()
        pytest.fail("the second Ctrl-C was ignored")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_prior_that_nothing_is_there_for_is_said(workplace, capsys, caplog):
    assert run(["train", *SMALL, "--steps", "1", "--prior-weight", "0.5"]) == 0
    assert "prior_weight = 0.5 changes nothing" in caplog.text


def test_concepts_regularisation_and_sizes_from_a_file(workplace, capsys):
    from PIL import Image

    (workplace / "kept").mkdir()
    Image.new("RGB", (64, 64), (9, 9, 200)).save(workplace / "kept" / "heart.png")
    (workplace / "kept" / "heart.txt").write_text("heart", encoding="utf-8")
    (workplace / "run.toml").write_text(
        "resolution = 64\naccumulation = 2\nsteps = 2\nmore_resolutions = [96]\n"
        'regularisation = "kept"\nprior_weight = 0.5\nprior_share = 0.25\nprior_target = "base"\n'
        '[[concepts]]\nimages = "pictures"\nstyle_phrase = "<v0>"\nrepeats = 3\n'
        '[[concepts]]\nimages = "pictures"\nstyle_phrase = "<v1>"\nresolutions = [64]\n',
        encoding="utf-8",
    )
    trained(capsys, "train", "--config", "run.toml", "--rank", "2", "--out", "parts")
    job = json.loads((workplace / "parts" / "job.json").read_text(encoding="utf-8"))
    assert [concept["repeats"] for concept in job["concepts"]] == [3, 1]
    assert trained(capsys, "inspect", "parts/adapter.safetensors")["style_phrase"] == "<v0>"
    assert trained(capsys, "resume", "parts", "--steps", "3")["steps"] == 3
    trained(capsys, "train", "--config", "run.toml", "--rank", "2", "--steps", "3", "--out", "whole")
    same = [load_file(workplace / name / "adapter.safetensors") for name in ("parts", "whole")]
    assert all(same[0][key].equal(same[1][key]) for key in same[0])


def test_folders_with_repeats_and_the_base_on_the_style_s_own_pictures(workplace):
    from stylewright.training.cli.job import Job
    from stylewright.training.cli.pictures import at_sizes, items_of
    from stylewright.training.loops.config import TrainConfig

    (workplace / "more").mkdir()
    for name in ("tree.png", "tree.txt"):
        (workplace / "more" / name).write_bytes((workplace / "pictures" / name).read_bytes())
    job = Job(images=("pictures", "more"), repeats=(1, 4), prior_target="base", prior_weight=0.5, caption_orders=3)
    items = at_sizes(items_of(job, TrainConfig(style_phrase="ink")), 64, (96, 64))
    assert [(item.caption, item.repeats, item.concept.role) for item in items] == [
        ("star", 1, "style"), ("tree", 1, "style"), ("tree", 4, "style"),
        ("star", 1, "base"), ("tree", 1, "base"), ("tree", 4, "base"),
    ]  # fmt: skip
    assert {item.concept.resolutions for item in items} == {(64, 96)}
    assert {item.concept.orders for item in items} == {3}
    assert [item.concept.caption_mode for item in items[2:4]] == ["content", "plain"]
