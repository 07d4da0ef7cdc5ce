"""Another adapter as the beginning of a run: the same effect, and everything of it learns."""

import re

import pytest
import torch
from adapter_models import METHODS, adapted_weights, metadata_for, train

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.formats.adapters import load_adapter, save_adapter
from stylewright.training.formats.starting import start_of

LINEAR = "double_blocks.0.img_attn.proj", "double_blocks.0.txt_mlp.0"


@pytest.fixture
def make(tmp_path):
    """``make(method)`` -> (tree, the adapter's file opened, the weights that it makes)."""

    def made(method):
        tree, config, state, weights = train("flux", "native", method, lambda name, layer: name in LINEAR)
        path = tmp_path / "one.safetensors"
        save_adapter(path, state, metadata_for("flux", config), "peft")
        return tree, load_adapter(path, "native"), weights

    return made


def begun(tree, loaded, config):
    """The state that a run of ``config`` begins with, and the weights that it makes."""
    with attached(tree, config, family="flux", seed=7) as adapter:
        start = start_of(loaded, config, "one.safetensors")
        state = start.joined(adapter.state_dict())
    return start, state, adapted_weights(tree, config, "flux", state)


def config_like(loaded, **changes):
    options = {"method": loaded.method, "rank": loaded.rank, "alpha": loaded.alpha}
    return AdapterConfig(**{**options, "targets": tuple(map(re.escape, loaded.names)), **changes})


def close(found, expected):
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_settings_begin_with_the_very_tensors(method, make):
    tree, loaded, weights = make(method)
    start, state, found = begun(tree, loaded, config_like(loaded))
    assert state.keys() == loaded.state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state.items())
    close(found, weights)
    assert start.digest == start_of(loaded, config_like(loaded), "another name").digest


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"rank": 5}), ("lora", {"alpha": 1.0}), ("lora", {"method": "rslora", "rank": 4, "alpha": 2.0}),
        ("rslora", {"method": "lora", "alpha": None}), ("dora", {"rank": 6, "alpha": None}), ("loha", {"rank": 4}),
        ("lokr", {"alpha": 1.0}),
    ],
)  # fmt: skip
def test_another_rank_or_scale_has_the_same_effect(method, changes, make):
    tree, loaded, weights = make(method)
    _, state, found = begun(tree, loaded, config_like(loaded, **changes))
    close(found, weights)
    for outer, inner in (("lora_B.weight", "lora_A.weight"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")):
        for name in loaded.names if f"{loaded.names[0]}.{outer}" in state else ():
            # What is zero on both sides could never learn.
            assert (state[f"{name}.{outer}"].any(0) | state[f"{name}.{inner}"].any(1)).all()


def test_a_lower_rank_is_the_nearest_and_says_what_it_keeps(make):
    tree, loaded, weights = make("lora")
    start, _, found = begun(tree, loaded, config_like(loaded, rank=1))
    shares, base = [], tree.weights()
    for name in loaded.names:
        change = (weights[name] - base[name]).double()
        values = torch.linalg.svdvals(change)
        shares.append(float(values[0] ** 2 / values.square().sum()))
        torch.testing.assert_close((found[name] - weights[name]).double().norm(), values[1:].norm(), rtol=1e-4, atol=0)
    assert f"lowered to 1, which keeps {100 * min(shares):.4g} %" in start.said


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"method": "lokr"}, "is a lora adapter, and this run trains lokr"),
        ("lokr", {"rank": 2}, "rank of this method cannot be changed"),
        ("loha", {"rank": 2}, "rank of this method cannot be changed"),
        ("oft", {"rank": 2}, "rank of this method cannot be changed"),
    ],
)
def test_what_cannot_be_had_is_refused(method, changes, message, make):
    _, loaded, _ = make(method)
    with pytest.raises(ValueError, match=message):
        start_of(loaded, config_like(loaded, **changes), "one.safetensors")


def test_layers_that_the_run_does_not_train_are_refused(make):
    tree, loaded, _ = make("lora")
    with pytest.raises(ValueError, match=r"one\.safetensors adapts layers that this run does not.*targets"):
        begun(tree, loaded, config_like(loaded, targets=(re.escape(LINEAR[0]),)))


def test_layers_that_the_adapter_lacks_begin_with_nothing(make):
    tree, loaded, weights = make("lora")
    targets = (*map(re.escape, loaded.names), r"double_blocks\.0\.txt_mlp\.2")
    _, state, found = begun(tree, loaded, config_like(loaded, targets=targets))
    assert len(state) == 6 and len(loaded.state) == 4
    close(found, weights)
