"""Students between students: the change of every layer is the mean of both changes."""

from dataclasses import replace

import pytest
import torch

from stylewright.training.formats.adapters import load_adapter, save_adapter
from stylewright.training.formats.contents import read_adapter
from stylewright.training.formats.merging import merge_students, names_apart
from stylewright.training.formats.metadata import FULL, AdapterMetadata, build_metadata
from stylewright.training.formats.resizing import Cut
from stylewright.training.formats.whole import inspect_whole, is_whole, load_whole, save_whole

ONE_STEP = {"level": 1.0, "unit": "sigma", "prediction": "flow", "start": "unit"}
ABOUT = AdapterMetadata(
    "flux", "lora", 2, 4.0, process="flow", prediction="flow", one_step=ONE_STEP, seed=3, style_phrase="ink"
)
NAMES = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
SINGLE = "single_transformer_blocks.1.proj_out"
INJECTED = {
    "styleinject_A": (4, 2, 8), "styleinject_B": (8, 2), "styleinject_R": (4, 8), "styleinject_r": (4,),
}  # fmt: skip


def student(path, *, rank=2, names=NAMES, seed=0, style=None, width=8, kinds="AB", **changes):
    draw, state = torch.Generator().manual_seed(seed), {}
    for name in names:
        state[f"{name}.lora_A.weight"] = torch.randn(rank, 8, generator=draw)
        state[f"{name}.lora_B.weight"] = torch.randn(width, rank, generator=draw)
    about = replace(ABOUT, rank=rank, **changes)
    save_adapter(path, state, build_metadata(about), style)
    return path


def deltas(path):
    """The change of each of diffusers' layers."""
    loaded = load_adapter(path, "diffusers")
    ends = ("lora_B.weight", "lora_A.weight")
    return {
        name: loaded.alpha / loaded.rank * loaded.state[f"{name}.{ends[0]}"] @ loaded.state[f"{name}.{ends[1]}"]
        for name in loaded.names
    }


@pytest.mark.parametrize("style", ["comfyui", "diffusers", "kohya", "peft"])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_every_layers_change_is_between_both(weight, style, tmp_path):
    one = student(tmp_path / "a.safetensors", style=style)
    two = student(tmp_path / "b.safetensors", rank=3, seed=1, alpha=1.5, names=[*NAMES, SINGLE], style=style)
    merge_students(one, two, tmp_path / "m.safetensors", weight)
    a, b, merged = (deltas(tmp_path / f"{name}.safetensors") for name in "abm")
    assert merged.keys() == (a.keys() if weight == 1 else b.keys())
    for name, found in merged.items():
        expected = weight * a.get(name, torch.zeros(8, 8)) + (1 - weight) * b[name]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_file_is_a_student_and_says_what_it_is_of(tmp_path):
    one = student(tmp_path / "a.safetensors", steps=10)
    two = student(tmp_path / "b.safetensors", seed=1, style_phrase="oil", steps=20)
    merge_students(one, two, tmp_path / "m.safetensors", 0.3)
    file = read_adapter(tmp_path / "m.safetensors")
    assert file.about.one_step == ONE_STEP and (file.about.process, file.about.prediction) == ("flow", "flow")
    assert file.header["stylewright.merged"] == "0.3 of a.safetensors and 0.7 of b.safetensors"
    assert file.about.style_phrase == "" and file.about.steps is None and file.about.seed is None
    assert not file.unknown and max(layer.rank for layer in file.layers.values()) >= 4


def test_files_of_one_name_are_told_apart_by_their_folders_and_levels_have_few_digits(tmp_path):
    one, two = (tmp_path / "runs" / name / "x" / "adapter.safetensors" for name in ("one", "two"))
    student(one)
    student(two, seed=1, one_step={**ONE_STEP, "level": 0.4000000059604645})
    with pytest.raises(ValueError, match=r"level is 1 in one/x/adapter.safetensors and 0\.4 in two/x/adapter"):
        merge_students(one, two, tmp_path / "m.safetensors", 0.5)
    student(one, one_step={**ONE_STEP, "level": 0.4})
    merge_students(one, two, tmp_path / "m.safetensors", 0.25)
    header = read_adapter(tmp_path / "m.safetensors").header
    assert header["stylewright.merged"] == "0.25 of one/x/adapter.safetensors and 0.75 of two/x/adapter.safetensors"
    assert names_apart(one, one) == (one.name, one.name)


def test_a_lower_rank_afterwards_is_the_best_of_it(tmp_path):
    one, two = (student(tmp_path / f"{n}.safetensors", seed=n, names=[SINGLE]) for n in range(2))
    merge_students(one, two, tmp_path / "m.safetensors", 0.5)
    merge_students(one, two, tmp_path / "s.safetensors", 0.5, Cut(value=2))
    whole, small = (deltas(tmp_path / f"{name}.safetensors")[SINGLE] for name in "ms")
    left, values, right = torch.linalg.svd(whole)
    torch.testing.assert_close(small, (left[:, :2] * values[:2]) @ right[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"one_step": {**ONE_STEP, "level": 0.4}}, "level is 1 in a.safetensors and 0.4 in b.safetensors"),
        ({"one_step": {**ONE_STEP, "start": "scaled"}}, "student's start"),
        ({"one_step": {**ONE_STEP, "unit": "time"}}, "student's unit"),
        ({"prediction": "eps"}, "prediction is flow in"),
        ({"process": "vp"}, "process is flow in"),
        ({"family": "sd3"}, "family is flux in"),
        ({"one_step": {}}, "b.safetensors does not say that it is a one-step student"),
        ({"width": 6}, "expected one model"),
        ({"style": "peft"}, "stylewright convert --style"),
    ],
)
def test_students_that_cannot_be_merged_are_told_apart_and_nothing_is_written(changes, words, tmp_path):
    one = student(tmp_path / "a.safetensors", style="comfyui")
    names = [name.replace("to_q", "add_q_proj") for name in NAMES[:1]] if changes.get("family") else NAMES
    two = student(tmp_path / "b.safetensors", names=names, **changes)
    with pytest.raises(ValueError, match=words):
        merge_students(one, two, tmp_path / "m.safetensors", 0.5)
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_weights_beyond_both_are_refused(weight, tmp_path):
    one = student(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="from 0 to 1"):
        merge_students(one, one, tmp_path / "m.safetensors", weight)


def whole(path, *, seed=0, **changes):
    draw = torch.Generator().manual_seed(seed)
    state = {"a.weight": torch.randn(3, 4, generator=draw), "a.bias": torch.randn(3, generator=draw).bfloat16()}
    save_whole(path, state, replace(ABOUT, method=FULL, rank=1, alpha=None, **changes))
    return path


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_all_weights_are_between_those_of_both(weight, tmp_path):
    one, two = (whole(tmp_path / f"{n}.safetensors", seed=n) for n in range(2))
    merge_students(one, two, tmp_path / "m.safetensors", weight)
    a, b, merged = load_whole(one), load_whole(two), load_whole(tmp_path / "m.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (weight * a[name].float() + (1 - weight) * b[name].float()).to(tensor.dtype))
    if weight in (0.0, 1.0):
        assert all(torch.equal(tensor, (a if weight else b)[name]) for name, tensor in merged.items())
    assert is_whole(tmp_path / "m.safetensors")
    said = inspect_whole(tmp_path / "m.safetensors").metadata["stylewright.merged"]
    assert said == f"{weight:g} of 0.safetensors and {1 - weight:g} of 1.safetensors"


def test_a_model_is_for_all_weights_with_an_adapter_and_ranks_are_of_adapters(tmp_path):
    one, two, adapter = whole(tmp_path / "a.safetensors"), whole(tmp_path / "b.safetensors"), tmp_path / "c.safetensors"
    student(adapter, base_model="X")
    unused = pytest.fail
    for files, cut, changed, words in (
        (
            (one, adapter),
            None,
            None,
            r"c\.safetensors is an adapter, .* Give the model .* with --model \(its file says X\)",
        ),
        ((adapter, one), None, None, r"c\.safetensors is an adapter"),
        ((one, two), Cut(value=2), None, "leave --rank out"),
        ((one, adapter), Cut(value=2), unused, "leave --rank out"),
        ((one, two), None, unused, "both students have all weights, .* leave --model out"),
        ((adapter, adapter), None, unused, "both students are adapters, .* leave --model out"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_students(*files, tmp_path / "m.safetensors", 0.5, cut, changed=changed)
    with pytest.raises(ValueError, match="student's level"):
        late = whole(tmp_path / "d.safetensors", one_step={**ONE_STEP, "level": 0.4})
        merge_students(one, late, tmp_path / "m.safetensors", 0.5)


def test_all_weights_and_an_adapter_are_called_alike_or_not_merged_and_no_model_is_opened(tmp_path):
    one, other = whole(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    student(other, one_step={**ONE_STEP, "level": 0.4})
    with pytest.raises(ValueError, match=r"level is 1 in a\.safetensors and 0\.4 in b\.safe"):
        merge_students(one, other, tmp_path / "m.safetensors", 0.5, changed=pytest.fail)
    draw = {f"{NAMES[0]}.{name}": torch.ones(shape) for name, shape in INJECTED.items()}
    save_adapter(other, draw, build_metadata(replace(ABOUT, method="styleinject", options={"branches": 4})))
    with pytest.raises(ValueError, match="is no change of weights"):
        merge_students(one, other, tmp_path / "m.safetensors", 0.5, changed=pytest.fail)


@pytest.mark.parametrize("where", ["all weights", "the adapter"])
def test_what_is_not_finite_is_never_written(where, tmp_path):
    one, adapter = whole(tmp_path / "a.safetensors"), student(tmp_path / "b.safetensors")
    states = {name: load_whole(one) for name in ("all weights", "the adapter")}
    states[where]["a.weight"][0, 0] = float("nan")
    save_whole(one, states["all weights"], replace(ABOUT, method=FULL, rank=1, alpha=None))
    with pytest.raises(ValueError, match=r"a\.weight is not finite between a\.safetensors and b\.safetensors"):
        merge_students(one, adapter, tmp_path / "m.safetensors", 0.5, changed=lambda _: states["the adapter"])
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(("weight", "side"), [(1.0, 64), (0.5, 64), (0.4, 128)])
def test_the_size_is_the_weightier_students(tmp_path, weight, side):
    """For the sampler draws it, and would draw the family's usual size without one."""
    one = student(tmp_path / "a.safetensors", resolution=64)
    two = student(tmp_path / "b.safetensors", resolution=128, seed=1)
    merge_students(one, two, tmp_path / "m.safetensors", weight)
    assert read_adapter(tmp_path / "m.safetensors").about.resolution == side
