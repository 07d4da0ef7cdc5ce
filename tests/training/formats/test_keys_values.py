"""Keys and values alone: the same numbers in either layout, and in every file."""

import pytest
import torch
from adapter_models import H, as_diffusers, make_tree, metadata_for

from stylewright.training.adapters.attach import attached, layers_to_adapt
from stylewright.training.adapters.keys_values import own_places, rows_of, stacked_rows
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.formats.adapters import load_adapter, save_adapter
from stylewright.training.formats.contents import read_adapter
from stylewright.training.formats.starting import start_of

RANK = 3


def steps_of(tree, config, family, count=4):
    """Weights and tensors after a few steps, with decay, towards a target for each layer; the first factors given."""
    with attached(tree, config, family=family, seed=3) as adapter:
        state = adapter.state_dict()
        for name, tensor in state.items():
            if name.endswith("lora_A.weight"):
                state[name] = first_factor(name.removesuffix(".lora_A.weight"), tensor)
        adapter.load_state_dict(state)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(count):
            optimizer.zero_grad()
            outputs = [
                adapter.layer(name)(torch.eye(H)) - adapter.layer(name)(torch.zeros(1, H)) for name in adapter.names
            ]
            sum((output - 1).square().sum() for output in outputs).backward()  # each output by itself
            optimizer.step()
        trained, weights = adapter.state_dict(), {}
        for name in adapter.names:
            layer = adapter.layer(name)
            weights[name] = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
    return trained, weights


def first_factor(layer, like):
    """The same for a stacked layer as for its parts, by their diffusers names."""
    places = {"to_k": 0, "to_v": 1, "add_k_proj": 2, "add_v_proj": 3}
    ends = {"txt_attn.qkv": ["add_k_proj", "add_v_proj"], "context_block.attn.qkv": ["add_k_proj", "add_v_proj"]}
    parts = next((names for end, names in ends.items() if layer.endswith(end)), ["to_k", "to_v"])
    names = parts if len(like) == 2 * RANK else [layer.rpartition(".")[2]]
    draws = [torch.randn(RANK, H, generator=torch.Generator().manual_seed(places[name])) for name in names]
    return torch.cat(draws) / RANK


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
@pytest.mark.parametrize("preset", ["kv_text", "kv_both"])
def test_both_layouts_learn_the_same(family, preset, method):
    config = AdapterConfig(method=method, rank=RANK, alpha=5.0, targets=preset)
    _, of_native = steps_of(make_tree(family, "native"), config, family)
    _, of_separate = steps_of(make_tree(family, "diffusers"), config, family)
    expected = make_tree(family, "diffusers")
    expected = {name: expected.weight(name) for name in expected.names} | of_separate
    found = as_diffusers(family, of_native)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
    for name, weight in of_native.items():
        queries = [part for part in as_diffusers(family, {name: weight}) if part.endswith(("to_q", "add_q_proj"))]
        assert all(torch.equal(found[part], expected[part]) for part in queries)  # not a bit is changed
    assert of_separate.keys() <= found.keys()
    assert all(name.endswith(("_k", "_v", "k_proj", "v_proj")) for name in of_separate)


@pytest.mark.parametrize("style", ["comfyui", "kohya", "peft", "diffusers"])
@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_a_file_holds_two_adapters_of_the_rank(family, style, tmp_path):
    config = AdapterConfig(rank=RANK, alpha=5.0, targets="kv_both")
    state, weights = steps_of(make_tree(family, "native"), config, family)
    path = tmp_path / "kv.safetensors"
    save_adapter(path, state, metadata_for(family, config), style)
    base = make_tree(family, "native")
    for layout in ("native", "diffusers"):
        loaded = load_adapter(path, layout)
        changes = {
            name: loaded.alpha
            / loaded.rank
            * loaded.state[f"{name}.lora_B.weight"]
            @ loaded.state[f"{name}.lora_A.weight"]
            for name in loaded.names
        }
        added = {name: weight - base.weight(name) for name, weight in weights.items()}
        expected = added if layout == "native" else as_diffusers(family, added)
        for name, change in expected.items():
            torch.testing.assert_close(changes.get(name, torch.zeros_like(change)), change, rtol=1e-4, atol=1e-6)
    if style in ("peft", "diffusers"):
        ranks = {layer.rank for layer in load_layers(path, "diffusers")}
        assert ranks == {RANK}


def load_layers(path, layout):
    from stylewright.training.formats.layers import Layer

    loaded = load_adapter(path, layout)
    return [Layer("lora", {"A": loaded.state[f"{name}.lora_A.weight"]}) for name in loaded.names]


def filled(tree, config):
    """Random tensors where a run has any, and the weights that they make."""
    with attached(tree, config, family="flux", seed=3) as adapter:
        draw, state, weights = torch.Generator().manual_seed(1), adapter.state_dict(), {}
        for name, tensor in state.items():
            state[name] = torch.randn(tensor.shape, generator=draw)
            if "lora_B" in name:
                rows = rows_of(name.removesuffix(".lora_B.weight"), H, len(tensor))
                state[name] *= own_places(rows, len(tensor), config.rank)
        adapter.load_state_dict(state)
        for name in adapter.names:
            layer = adapter.layer(name)
            weights[name] = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
    return state, weights


@pytest.mark.parametrize("rank", [2, RANK, 5])
def test_another_run_begins_with_it(rank, tmp_path):
    config = AdapterConfig(rank=RANK, alpha=5.0, targets="kv_both")
    tree = make_tree("flux", "native")
    state, weights = filled(tree, config)
    path = tmp_path / "kv.safetensors"
    save_adapter(path, state, metadata_for("flux", config), "comfyui")
    further = AdapterConfig(rank=rank, targets="kv_both")
    with attached(tree, further, family="flux", seed=9) as adapter:
        start = start_of(load_adapter(path, "native"), further, "kv.safetensors")
        adapter.load_state_dict(start.joined(adapter.state_dict()))
        for name in adapter.names:
            change = adapter.layer(name).get_delta_weight("default")
            wanted = weights[name] - tree.get_submodule(name).get_base_layer().weight
            tolerance = {"rtol": 1e-4, "atol": 1e-6} if rank >= RANK else {"rtol": 0, "atol": float(wanted.abs().max())}
            torch.testing.assert_close(change, wanted, **tolerance)
            places = own_places(rows_of(name, H, len(change)), len(change), rank)
            assert not adapter.state_dict()[f"{name}.lora_B.weight"][~places].any()
    assert ("keeps 100 %" in start.said) == (rank >= RANK)


def test_an_adapter_of_queries_is_no_beginning(tmp_path):
    style = AdapterConfig(rank=RANK, targets=(r"img_attn\.qkv",))
    with attached(make_tree("flux", "native"), style, family="flux", seed=3) as adapter:
        state = {name: torch.ones_like(tensor) for name, tensor in adapter.state_dict().items()}
    path = tmp_path / "style.safetensors"
    save_adapter(path, state, metadata_for("flux", style), "comfyui")
    with pytest.raises(ValueError, match=r"style\.safetensors adapts more of the layer .*img_attn\.qkv than keys"):
        start_of(load_adapter(path, "native"), AdapterConfig(rank=RANK, targets="kv_both"), "style.safetensors")


@pytest.mark.parametrize("method", ["dora", "lokr", "loha", "oft"])
def test_methods_that_cannot_be_on_some_rows_are_refused(method):
    config = AdapterConfig(method=method, rank=4, targets="kv_text")
    with pytest.raises(ValueError, match=r"kv_text adapts keys and values alone.*txt_attn\.qkv.*choose lora or rslora"):
        layers_to_adapt(make_tree("flux", "native"), config, family="flux")
    layers_to_adapt(make_tree("flux", "diffusers"), config, family="flux")  # a layer for each


def published(family):
    """The models of the published sizes, without numbers."""
    import diffusers

    with torch.device("meta"):
        if family == "flux":
            return diffusers.FluxTransformer2DModel(guidance_embeds=True)
        if family == "sd3":  # SD3.5 large
            return diffusers.SD3Transformer2DModel(
                num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
            )
        if family == "sd15":
            return diffusers.UNet2DConditionModel(cross_attention_dim=768)
        return diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=2,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        )  # fmt: skip


# Numbers for a rank of 1, by arithmetic: layers * (inputs + outputs).
COUNTS = {
    ("sd15", "kv_text"): 49_536,
    ("sdxl", "kv_text"): 453_120,
    ("flux", "kv_text"): 233_472,
    ("flux", "kv_both"): 2 * 233_472 + 466_944,  # both streams of the double blocks, and the single ones
    ("sd3", "kv_text"): 369_664,
}


@pytest.mark.parametrize(("family", "preset"), COUNTS)
def test_numbers_of_an_adapter_on_the_published_models(family, preset):
    model = published(family)
    names = layers_to_adapt(model, AdapterConfig(rank=1, targets=preset), family=family)
    layers = [model.get_submodule(name) for name in names]
    assert sum(layer.in_features + layer.out_features for layer in layers) == COUNTS[family, preset]


@pytest.mark.parametrize("preset", ["kv_text", "kv_both"])
def test_stacked_layers_learn_as_many_numbers(preset):
    count = {}
    for layout in ("native", "diffusers"):
        tree, config = make_tree("flux", layout), AdapterConfig(rank=2, targets=preset)
        names = layers_to_adapt(tree, config, family="flux")
        layers = {name: tree.get_submodule(name) for name in names}
        stacked, total = stacked_rows(preset, layers), 0
        for name, layer in layers.items():
            doubled = name in stacked
            total += 2 * (1 + doubled) * layer.in_features
            total += int(own_places(stacked[name], layer.out_features, 2).sum()) if doubled else 2 * layer.out_features
        count[layout] = total
    assert count["native"] == count["diffusers"] > 0


def test_rows_of_layers_with_other_proportions():
    assert rows_of("layers.0.attention.qkv", 96, 192) == (range(96, 144), range(144, 192))  # half as many keys' heads
    assert rows_of("blocks.0.attn.qkv_y", 32, 192) == (range(64, 128), range(128, 192))  # fewer inputs than rows
    assert rows_of("single_blocks.0.linear1", 8, 56) == (range(8, 16), range(16, 24))
    assert rows_of("blocks.0.cross_attn.kv_linear", 8, 16) == (range(8), range(8, 16))
    assert rows_of("transformer_blocks.0.attn.to_k", 8, 8) is None


def test_metadata_say_the_preset(tmp_path):
    config = AdapterConfig(rank=RANK, targets="kv_text")
    state, _ = steps_of(make_tree("flux", "native"), config, "flux", 1)
    path = tmp_path / "kv.safetensors"
    save_adapter(path, state, metadata_for("flux", config, targets=("kv_text",)), None)
    assert read_adapter(path).about.targets == ("kv_text",)
