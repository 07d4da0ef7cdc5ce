"""Our files in ComfyUI's stock loader: every tensor lands, and the patched weights are the ones that were trained."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from adapter_models import METHODS, Tree, adapted_weights, as_diffusers, as_layer, config_for, metadata_for, randomise
from safetensors.torch import load_file
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.formats.adapters import inspect_adapter, load_adapter, save_adapter
from stylewright.training.formats.keys import native_place

pytestmark = pytest.mark.comfy

# ComfyUI's own tables leave out some layers under diffusers names; those are reached under native ones.
READABLE = {
    "flux": ("kohya", "comfyui", "diffusers"),
    "sd3": ("kohya", "comfyui", "diffusers"),
    "pixart": ("kohya", "comfyui", "diffusers"),
    "sd15": ("kohya", "comfyui"),
    "sdxl": ("kohya", "comfyui"),
}


def tiny_model(family):
    """The tiny random models of the bridge's tests."""
    path = Path(__file__).parents[2] / "nodes" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_comfy_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tiny_model(family)


def layers_of(network):
    """The layers that adapters can be on, by native name."""
    return {n: layer for n, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def fitting(method, name, layer):
    if method == "oft":
        return layer.weight[0].numel() == layer.weight.shape[1] and layer.weight.shape[1] % 4 == 0
    return min(layer.weight.shape[0], layer.weight[0].numel()) >= 3 and name != "pos_embedder"


def apply_stock(patcher, path, caplog):
    """Name of a weight -> the weight as ComfyUI patches it. Asserts that no tensor is left over."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils

    tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path), safe_load=True))
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    with caplog.at_level(logging.WARNING):
        loaded = comfy.lora.load_lora(tensors, key_map)
    assert not [record.message for record in caplog.records if "not loaded" in record.message]
    clone = patcher.clone()
    assert set(clone.add_patches(loaded)) == set(loaded)
    with caplog.at_level(logging.ERROR):
        weights = {
            key.removeprefix("diffusion_model.").removesuffix(".weight"): comfy.lora.calculate_weight(
                patches, comfy.utils.get_attr(patcher.model, key).detach().clone(), key
            )
            for key, patches in clone.patches.items()
        }
    assert not [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    return weights


def assert_same(got, wanted):
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, atol=2e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def train_on(module, names, family, method):
    config = config_for(method, [name.replace(".", r"\.") for name in names])
    with attached(module, config, family=family, seed=3) as adapter:
        randomise(adapter, size=0.2)
        state = adapter.state_dict()
    return config, state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", READABLE)
def test_trained_on_comfyuis_own_model(tmp_path, caplog, family, method):
    path = tmp_path / "adapter.safetensors"
    patcher = tiny_model(family)
    network = patcher.model.diffusion_model
    layers = {n: layer for n, layer in layers_of(network).items() if fitting(method, n, layer)}
    network_weights = {n: layer.weight.detach().clone() for n, layer in layers.items()}
    assert len(layers) >= 20
    config, state = train_on(network, layers, family, method)
    tree = Tree({n: as_layer(weight, layers[n]) for n, weight in network_weights.items()})
    wanted = adapted_weights(tree, config, family, state)
    metadata = metadata_for(family, config, unet_layers=1)
    for style in (None, *READABLE[family]):
        if style == "diffusers" and method in ("lokr", "oft"):
            continue  # which it says it cannot hold
        if method == "dora" and style in ("kohya", "diffusers"):
            continue  # with the paper's norm, which ComfyUI does not compute
        save_adapter(path, state, metadata, style, weights=tree.weight)
        got = apply_stock(patcher, path, caplog)
        assert got.keys() == wanted.keys(), style
        assert_same(got, wanted)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, network_weights[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", READABLE)
def test_trained_under_diffusers_names(tmp_path, caplog, family, method):
    path = tmp_path / "adapter.safetensors"
    patcher = tiny_model(family)
    native = {n: layer for n, layer in layers_of(patcher.model.diffusion_model).items() if fitting(method, n, layer)}
    if family in ("sd15", "sdxl"):  # the tiny UNets have one layer a level, and attention where SD1.5 has none
        native = {n: layer for n, layer in native.items() if not n.endswith(".conv")}
    layers = {}
    for name, layer in native.items():
        parts = as_diffusers(family, {name: layer.weight.detach()}, unet_layers=1)
        layers |= {part: as_layer(weight, layer) for part, weight in parts.items()}
    tree = Tree(layers)
    config, state = train_on(tree, tree.names, family, method)
    wanted = adapted_weights(tree, config, family, state)
    metadata = metadata_for(family, config, unet_layers=1)
    for style in (None, *READABLE[family]):
        if (method, style) in (("dora", "kohya"), ("dora", "diffusers"), ("oft", "diffusers")):
            continue
        save_adapter(path, state, metadata, style, weights=tree.weight)
        got = apply_stock(patcher, path, caplog)
        assert got.keys() == native.keys(), style
        split = {}
        for name, weight in got.items():
            split |= as_diffusers(family, {name: weight}, unet_layers=1)
        assert_same(split, wanted)


def test_dora_in_the_papers_norm_is_close_in_comfyui(tmp_path, caplog):
    """What a file without the base weights is worth there: a small share of the adapter's own effect."""
    path = tmp_path / "adapter.safetensors"
    patcher = tiny_model("flux")
    network = patcher.model.diffusion_model
    name = "double_blocks.0.img_attn.proj"
    weight = network.get_submodule(name).weight.detach().clone()
    config = config_for("dora", [name])
    with attached(network, config, family="flux", seed=3) as adapter:
        randomise(adapter, size=0.02)
        state = adapter.state_dict()
    tree = Tree({name: as_layer(weight, network.get_submodule(name))})
    wanted = adapted_weights(tree, config, "flux", state)[name]
    save_adapter(path, state, metadata_for("flux", config), "kohya")
    got = apply_stock(patcher, path, caplog)[name]
    assert 1e-6 < (got - wanted).norm() / (wanted - weight).norm() < 0.02
    assert inspect_adapter(path).metadata["stylewright.dora_norm"] == "merged"


def test_names_are_those_of_comfyuis_modules():
    """Our tables against the modules that exist: every native name, and every diffusers name of ComfyUI's key map."""
    import comfy.lora

    for family in READABLE:
        patcher = tiny_model(family)
        modules = set(layers_of(patcher.model.diffusion_model))
        known = {name for name in modules if as_diffusers(family, {name: torch.zeros(72, 8)}, unet_layers=1)}
        assert known == modules, (family, modules - known)
        if family in ("flux", "sd3", "pixart"):
            mapped = comfy.lora.model_lora_keys_unet(patcher.model, {})
            for key, target in mapped.items():
                if key.startswith("transformer."):
                    place = native_place(family, key.removeprefix("transformer."))
                    to = (target if isinstance(target, str) else target[0]).removesuffix(".weight")
                    if place and to.removeprefix("diffusion_model.") in modules:
                        assert place.module == to.removeprefix("diffusion_model."), key


def test_stock_file_comes_back(tmp_path):
    """A file as ComfyUI's own trainer saves one."""
    from safetensors.torch import save_file

    patcher = tiny_model("sdxl")
    name = "output_blocks.0.1.transformer_blocks.1.attn1.to_q"
    weight = patcher.model.diffusion_model.get_submodule(name).weight
    tensors = {
        f"diffusion_model.{name}.lora_up.weight": torch.randn(weight.shape[0], 4),
        f"diffusion_model.{name}.lora_down.weight": torch.randn(4, weight.shape[1]),
        f"diffusion_model.{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "stock.safetensors")
    assert len(load_file(tmp_path / "stock.safetensors")) == 3
    loaded = load_adapter(tmp_path / "stock.safetensors")
    assert (loaded.family, loaded.rank, loaded.alpha, loaded.names) == ("sdxl", 4, 2.0, (name,))
