"""Files with all weights of a network: their header says what is in them, and no adapter's reader takes them."""

from dataclasses import asdict

import pytest
import torch

from stylewright.training.cli.files import lines_of
from stylewright.training.formats.adapters import convert_adapter, load_adapter
from stylewright.training.formats.contents import read_adapter, read_outline
from stylewright.training.formats.metadata import FULL, AdapterMetadata
from stylewright.training.formats.resizing import Cut, resize_adapter
from stylewright.training.formats.whole import inspect_whole, load_whole, save_whole
from stylewright.training.hosts.loading import load_host

ONE_STEP = {"level": 0.4, "unit": "sigma", "prediction": "flow", "start": "unit"}
STATE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.arange(3.0).bfloat16()}


@pytest.fixture
def student(tmp_path):
    about = AdapterMetadata("sd3", FULL, 1, one_step=ONE_STEP, title="One-step student", base_model="mine", steps=7)
    save_whole(tmp_path / "student.safetensors", STATE, about)
    return tmp_path / "student.safetensors"


def test_a_report_says_what_the_file_is(student):
    report = inspect_whole(student)
    expected = {"family": "sd3", "method": "full", "one_step": "at sigma 0.4", "title": "One-step student"}
    expected |= {"base_model": "mine", "tensors": 2, "parameters": 15, "dtypes": ("bfloat16", "float32")}
    assert {name: value for name, value in asdict(report).items() if name in expected} == expected
    assert "one step              at sigma 0.4" in list(lines_of(report))
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in load_whole(student).items())


@pytest.mark.parametrize(
    "use",
    [
        read_adapter,
        read_outline,
        load_adapter,
        lambda path: resize_adapter(path, path.with_name("out.safetensors"), Cut(value=2)),
        lambda path: convert_adapter(path, path.with_name("out.safetensors"), "kohya"),
    ],
    ids=["read", "outline", "load", "resize", "convert"],
)
def test_it_is_no_adapter_and_the_message_says_what_it_is(use, student):
    with pytest.raises(ValueError, match=r"student\.safetensors has all weights of a sd3 network, .* is no adapter"):
        use(student)
    assert [path.name for path in student.parent.iterdir()] == [student.name]


def test_it_is_no_model_of_its_own(student):
    with pytest.raises(ValueError, match=r"--model MODEL --adapter .*student\.safetensors"):
        load_host(student)


def test_what_is_no_such_file_has_no_such_report(tmp_path):
    save_whole(tmp_path / "lora.safetensors", STATE, AdapterMetadata("sd3", "lora", 1))
    with pytest.raises(ValueError, match="does not say that it is"):
        inspect_whole(tmp_path / "lora.safetensors")
