"""Methods: what the adapted layer computes, in closed form, and which settings make no sense."""

import math

import pytest
import torch
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import METHODS, AdapterConfig, check_layers, peft_config

INPUTS, OUTPUTS = 12, 20


def adapted(method, rank=4, alpha=None, size=0.05):
    """(x, weight, output without bias, tensors) of one layer with a random adapter."""
    dtype = torch.float64
    source = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False)).to(dtype).requires_grad_(False)
    model[0].weight.copy_(torch.randn(OUTPUTS, INPUTS, generator=source))
    x = torch.randn(3, 5, INPUTS, generator=source, dtype=dtype)
    with attached(model, AdapterConfig(method, rank, alpha, ("0",)), family="other", seed=0, dtype=dtype) as adapter:
        state = {
            name: torch.randn(tensor.shape, generator=source, dtype=dtype) * size
            for name, tensor in adapter.state_dict().items()
        }
        adapter.load_state_dict(state)
        tensors = {name.removeprefix("0.").removesuffix(".weight"): tensor for name, tensor in state.items()}
        return x, model[0].weight, model(x).detach(), tensors


@pytest.mark.parametrize("method, scale", [("lora", 3 / 4), ("rslora", 3 / math.sqrt(4))])
def test_lora_adds_a_scaled_product(method, scale):
    x, weight, output, t = adapted(method, rank=4, alpha=3)
    torch.testing.assert_close(output, x @ (weight + scale * t["lora_B"] @ t["lora_A"]).T)


def test_alpha_is_the_rank_by_default():
    x, weight, output, t = adapted("lora")
    torch.testing.assert_close(output, x @ (weight + t["lora_B"] @ t["lora_A"]).T)


def test_dora_scales_the_directions():
    x, weight, output, t = adapted("dora", alpha=8)
    direction = weight + 2 * t["lora_B"] @ t["lora_A"]
    expected = x @ (t["lora_magnitude_vector"][:, None] * direction / direction.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(output, expected)


def test_loha_adds_a_product_of_products():
    x, weight, output, t = adapted("loha", alpha=8)
    delta = 2 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    torch.testing.assert_close(output, x @ (weight + delta).T)


def test_lokr_adds_a_kronecker_product():
    x, weight, output, t = adapted("lokr", rank=1, alpha=2)
    delta = 2 * torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"])
    torch.testing.assert_close(output, x @ (weight + delta).T)


def test_oft_rotates_blocks_of_inputs():
    """The columns of the weight are turned, so its Gram matrix over a block stays: to the series' accuracy."""
    x, weight, output, _ = adapted("oft", rank=4, size=0.02)
    turned = torch.linalg.lstsq(x.flatten(0, 1), output.flatten(0, 1)).solution.T
    for block in range(0, INPUTS, 4):
        before, after = weight[:, block : block + 4], turned[:, block : block + 4]
        assert (before - after).norm() > 0.01 * before.norm()
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-4)


def test_exactly_the_named_layers_are_adapted():
    """peft matches the entries of a list against the ends of names, and "proj_out" is at the end of both."""
    model = nn.Module()
    model.proj_out = nn.Linear(4, 4)
    model.blocks = nn.ModuleList([nn.ModuleDict({"proj_out": nn.Linear(4, 4)})])
    for targets in (("proj_out",), (r"\A" + "proj_out",), (r"blocks\.0\.proj_out",)):
        with attached(model, AdapterConfig(rank=2, targets=targets), family="other", seed=0) as adapter:
            adapted_layers = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
            assert adapted_layers == set(adapter.names)
            assert len(adapter.names) == (2 if targets == ("proj_out",) else 1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_peft_configuration(method):
    config = peft_config(AdapterConfig(method, rank=4), ["a.0.b", "c"])
    assert config.target_modules == r"a\.0\.b|c"
    assert config.peft_type.value.lower() == {"rslora": "lora", "dora": "lora"}.get(method, method)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"oft"}))
def test_dropout_reaches_peft(method):
    config = peft_config(AdapterConfig(method, rank=4, dropout=0.25), ["a"])
    assert 0.25 in (vars(config).get(name) for name in ("lora_dropout", "module_dropout", "dropout"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "lorax"}, "'lorax': expected one of lora, rslora, dora, lokr, loha, oft"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"method": "oft", "alpha": 4.0}, "alpha has no effect on oft"),
        ({"method": "oft", "dropout": 0.1}, "dropout has no effect on oft"),
        ({"dropout": 1.0}, r"dropout is 1.0: expected a share in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"init": "zeros"}, "'zeros': expected one of gaussian, uniform"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**settings)


@pytest.mark.parametrize(
    "config, layer, message",
    [
        (AdapterConfig(rank=5), nn.Linear(9, 4), "rank 5 is larger .* layer x.y, which has 9 inputs and 4 outputs"),
        (AdapterConfig(rank=5), nn.Linear(4, 9), "choose at most 4"),
        (AdapterConfig(rank=19), nn.Conv2d(2, 30, 3), "has 18 inputs and 30 outputs"),
        (AdapterConfig("oft", rank=4), nn.Linear(10, 10), "blocks of 4 inputs, and the layer x.y has 10"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(config, layer, message):
    with pytest.raises(ValueError, match=message):
        check_layers(config, {"x.y": layer})


def test_a_rank_as_large_as_the_smaller_side_fits():
    check_layers(AdapterConfig(rank=4), {"x": nn.Linear(9, 4), "y": nn.Conv2d(2, 4, 3)})
