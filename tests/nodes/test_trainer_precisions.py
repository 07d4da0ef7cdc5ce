"""The trainer node on files of every kind that users have, opened by the loader nodes, as in a graph."""

import importlib.util
import sys
from pathlib import Path

import comfy.cli_args
import comfy.model_management
import folder_paths
import nodes
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from stored_files import KINDS, form_of, opened, save
from tiny_models import TinyClip, TinyVae
from training_runs import memory

from stylewright.training.formats.contents import read_adapter

pytestmark = pytest.mark.comfy

spec = importlib.util.spec_from_file_location("family_proof", Path(__file__).with_name("family_proof.py"))
proof = sys.modules["family_proof"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(proof)


@pytest.fixture(params=KINDS)
def kind(request):
    """One of the kinds, by its name."""
    if reason := KINDS[request.param].missing():
        pytest.skip(reason)
    return KINDS[request.param]


@pytest.fixture
def load(kind, tmp_path, monkeypatch):
    """``load()`` opens the file, every time anew, as after a restart."""
    save(kind, tmp_path)
    for folder in ("diffusion_models", "unet_gguf"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path)], set()))
    if kind.flag:
        monkeypatch.setattr(comfy.cli_args.args, kind.flag, True)
    return lambda: proof.Parts("flux", opened(kind), TinyClip("flux"), TinyVae("flux", film=False))


def by_the_stock_node(parts, path):
    with proof.folders(path.parents[1]), torch.inference_mode():
        model, _ = nodes.LoraLoader().load_lora(parts.model, None, path.name, 1.0, 0.0)
    return model


def test_a_run_leaves_the_bytes_alone_and_goes_on_over_a_restart(kind, load, tmp_path, caplog):
    parts = load()
    layer = parts.model.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert form_of(layer.weight) == kind.weights
    before, (places, numbers) = proof.answer(parts.model, parts), memory(parts.model)
    with proof.counted(parts.model) as passes:
        path = proof.train(parts, tmp_path / "straight", **kind.widgets)
    now_at, now = memory(parts.model)
    assert now_at == places, "weights moved, or were copied"
    assert all(torch.equal(now[key], numbers[key]) for key in numbers)
    assert torch.equal(proof.answer(parts.model, parts), before)

    other = load()
    with proof.counted(other.model, cancel_in=len(passes) * 2 // 3), pytest.raises(InterruptProcessingException):
        proof.train(other, tmp_path / "cancelled", **kind.widgets)
    again = proof.train(load(), tmp_path / "cancelled", **kind.widgets)
    assert again.name == path.name and len(list((tmp_path / "cancelled/output/stylewright").iterdir())) == 1
    assert proof.same_content(path, again)

    trained = proof.answer_as_trained(parts, path)
    adapted = by_the_stock_node(parts, path)
    assert sum(map(len, adapted.patches.values())) == len(read_adapter(path).layers)  # FLUX's q, k, v are one weight
    assert not [message for message in caplog.messages if "not loaded" in message.lower()]
    moved = proof.relative(trained, before)
    assert moved > 0.1
    assert proof.relative(proof.answer(adapted, parts), trained) < kind.rounding + 1e-3


@pytest.mark.parametrize("kind", ["nvfp4 with AWQ"], indirect=True)
def test_gradients_pass_through_the_scale_of_inputs(load):
    found = proof.gradients(load())
    assert found.slope == pytest.approx(found.difference, rel=1e-3)
    assert found.slope == pytest.approx(found.checkpointed, rel=1e-5)


@pytest.mark.parametrize("kind", ["float32", "float8", "scaled float8", "nvfp4 with AWQ", "GGUF"], indirect=True)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_weights_that_are_streamed_train_the_same_adapter(share, kind, load, tmp_path, monkeypatch):
    """As with --novram and --lowvram, which ComfyUI does not take together with --cpu: none of the model is loaded, or
    a part."""
    expected = proof.train(load(), tmp_path / "loaded")
    parts, load_into = load(), comfy.model_management.LoadedModel.model_load
    monkeypatch.setattr(
        comfy.model_management.LoadedModel,
        "model_load",
        lambda self, room, **options: load_into(self, max(0.1, share * self.model_memory()), **options),
    )
    streamed, before = set(), memory(parts.model)[1]
    parts.model.model.diffusion_model.register_forward_pre_hook(
        lambda *args: streamed.add(1 - parts.model.loaded_size() / parts.model.model_size())
    )
    found = proof.train(parts, tmp_path / "streamed")
    assert min(streamed) > (0 if share else 0.9)  # ComfyUI loads more when it is asked again
    assert proof.same_content(found, expected)
    assert all(torch.equal(now, before[key]) for key, now in memory(parts.model)[1].items())
