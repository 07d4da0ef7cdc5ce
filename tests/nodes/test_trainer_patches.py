"""The trainer node on models that nodes before have patched: the patches are part of what is trained."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux, ModelSamplingSD3
from comfy_extras.nodes_tomesd import TomePatchModel

from stylewright.training.formats.contents import read_adapter

pytestmark = pytest.mark.comfy

spec = importlib.util.spec_from_file_location("family_proof", Path(__file__).with_name("family_proof.py"))
proof = sys.modules["family_proof"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(proof)

UNET_BLOCKS = [("input", 1), ("input", 4), ("middle", 0), ("output", 2), ("output", 5)]


def image_prompt(model, tokens=4):
    """As IP-Adapter does it: cross-attention attends to tokens of a picture, too, by keys and values of their own."""
    from comfy.ldm.modules.attention import optimized_attention

    model, draw = model.clone(), torch.Generator().manual_seed(3)

    def attention(q, k, v, extra_options):
        own = torch.randn(1, tokens, q.shape[-1], generator=draw.manual_seed(3)).expand(len(q), -1, -1)
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        out += 0.8 * optimized_attention(q, own, own.flip(1).contiguous(), extra_options["n_heads"])
        return out

    for block in UNET_BLOCKS:
        model.set_model_attn2_replace(attention, *block)
    return model


def longer_context(model):
    """More tokens for every cross-attention, as hypernetworks and regional prompts bring."""
    model = model.clone()

    def patch(q, context, value, extra_options):
        return q * 1.1, torch.cat([context, context.flip(1)], 1), torch.cat([value, value * 2], 1)

    model.set_model_attn2_patch(patch)
    return model


def free_u(model):
    return _of(FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2))


def v_prediction(model):
    return ModelSamplingDiscrete().patch(model, "v_prediction", zsnr=True)[0]


def _of(output):
    """The MODEL that a node gave: newer nodes give it in an object."""
    return output.args[0] if hasattr(output, "args") else output[0]


def patched(family, patch):
    parts = proof.load(family)
    with torch.inference_mode():
        return parts, replace(parts, model=patch(parts.model))


@pytest.mark.parametrize(
    ("family", "patch"),
    [
        ("sd15", image_prompt),
        ("sdxl", image_prompt),
        ("sd15", longer_context),
        ("sd15", free_u),
        ("sd15", v_prediction),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_patches_are_part_of_what_is_trained(family, patch, tmp_path):
    plain, parts = patched(family, patch)
    before, without = proof.answer(parts.model, parts), proof.answer(plain.model, plain)
    assert proof.relative(before, without) > 0.02, "the patch does nothing"
    with proof.counted(parts.model) as passes:
        path = proof.train(parts, tmp_path / "straight")
    again = proof.train_with_a_cancel(parts, tmp_path / "cancelled", len(passes))
    assert proof.same_content(path, again)
    assert torch.equal(proof.answer(parts.model, parts), before)
    assert torch.equal(proof.answer(plain.model, plain), without)
    trained, stock = proof.answer_as_trained(parts, path), proof.answer_of_stock_loader(parts, path)
    assert stock.unmatched == () and stock.layers == len(read_adapter(path).layers)
    assert proof.relative(stock.answer, trained) < 1e-3 < proof.relative(trained, before)
    found = proof.gradients(parts)
    assert found.slope == pytest.approx(found.difference, rel=1e-2)
    assert found.slope == pytest.approx(found.checkpointed, rel=1e-4)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_an_adapter_that_acts_by_its_input_below_is_part_of_what_is_trained(family, tmp_path):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors

    plain = proof.load(family)
    first = proof.train(plain, tmp_path / "first", method="styleinject", rank=3)
    with torch.inference_mode():
        below = apply_adapter(plain.model, None, read_tensors(first), Strengths(), warn=pytest.fail).model
    parts = replace(plain, model=below)
    before, without = proof.answer(below, parts), proof.answer(plain.model, plain)
    with proof.counted(parts.model) as passes:
        path = proof.train(parts, tmp_path / "second")
    assert proof.same_content(path, proof.train_with_a_cancel(parts, tmp_path / "cancelled", len(passes)))
    assert torch.equal(proof.answer(below, parts), before)
    assert torch.equal(proof.answer(plain.model, plain), without) and proof.relative(before, without) > 1e-3
    trained, stock = proof.answer_as_trained(parts, path), proof.answer_of_stock_loader(parts, path)
    assert stock.unmatched == ()
    assert proof.relative(stock.answer, trained) < 1e-4 < proof.relative(trained, before)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_lora_below_is_part_of_what_is_trained(family, tmp_path):
    """Of this trainer's own, by ComfyUI's loader: the second is what the first left over."""
    import nodes

    plain = proof.load(family)
    first = proof.train(plain, tmp_path / "first", seed=1)
    before = proof.answer(plain.model, plain)
    with proof.folders(tmp_path / "first"), torch.inference_mode():
        model, _ = nodes.LoraLoader().load_lora(plain.model, None, first.name, 0.7, 0.0)
    parts = replace(plain, model=model)
    below = proof.answer(model, parts)
    with proof.counted(parts.model) as passes:
        path = proof.train(parts, tmp_path / "second")
    assert proof.same_content(path, proof.train_with_a_cancel(parts, tmp_path / "cancelled", len(passes)))
    assert not proof.same_content(path, proof.train(plain, tmp_path / "plain"))
    assert torch.equal(proof.answer(model, parts), below)
    trained, stock = proof.answer_as_trained(parts, path), proof.answer_of_stock_loader(parts, path)
    assert stock.unmatched == ()
    assert proof.relative(stock.answer, trained) < 1e-3 < proof.relative(trained, below)
    assert proof.relative(proof.answer(plain.model, plain), before) < 1e-5  # ComfyUI has put its weights back


@pytest.mark.parametrize(
    ("family", "shift"),
    [
        ("sd3", lambda model: ModelSamplingSD3().patch(model, 6.0)[0]),
        ("flux", lambda model: ModelSamplingFlux().patch(model, 1.15, 0.5, 1024, 1024)[0]),
    ],
    ids=["sd3", "flux"],
)
def test_a_shift_of_the_sampler_changes_nothing_that_is_learned(family, shift, tmp_path):
    plain, parts = patched(family, shift)
    ours, theirs = proof.train(plain, tmp_path / "plain"), proof.train(parts, tmp_path / "shifted")
    one, other = (read_adapter(path).tensors for path in (ours, theirs))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    "patch",
    [
        lambda model: _of(TomePatchModel.execute(model, 0.3)),
        lambda model: _of(HyperTile.execute(model, 32, 2, 1, False)),
    ],
    ids=["token merging", "HyperTile"],
)
def test_a_model_that_draws_lots_is_refused(patch, tmp_path):
    _, parts = patched("sd15", patch)
    with pytest.raises(ValueError, match="draws random numbers whenever the model runs"):
        proof.train(parts, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
