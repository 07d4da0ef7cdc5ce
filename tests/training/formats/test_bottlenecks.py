"""Files of bottlenecks: what is shared stays shared, and what is stacked comes apart, both exactly."""

import pytest
import torch
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.bottleneck import bottleneck
from stylewright.training.formats.adapters import inspect_adapter, load_adapter, save_adapter
from stylewright.training.formats.contents import read_adapter, read_outline
from stylewright.training.formats.description import describe
from stylewright.training.formats.metadata import AdapterMetadata, build_metadata
from stylewright.training.formats.starting import start_of

H = 8
KV = {
    "double_blocks.0.img_attn.qkv": ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"),
    "double_blocks.0.txt_attn.qkv": ("transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.add_v_proj"),
    "single_blocks.0.linear1": ("single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.attn.to_v"),
}


def flux():
    """The fused layers of a FLUX as ComfyUI has them, of width 8."""
    attention = {stream: nn.ModuleDict({"qkv": nn.Linear(H, 3 * H)}) for stream in ("img_attn", "txt_attn")}
    tree = nn.ModuleDict(
        {
            "double_blocks": nn.ModuleList([nn.ModuleDict(attention)]),
            "single_blocks": nn.ModuleList([nn.ModuleDict({"linear1": nn.Linear(H, 7 * H)})]),
        }
    )
    return tree.requires_grad_(False)


def saved(path, config, only=None):
    """A file of random numbers where an adapter of these layers has any, and its tensors."""
    with attached(flux(), config, family="flux", seed=0) as adapter:
        state = adapter.state_dict()
        for number, (name, tensor) in enumerate(state.items()):
            places = tensor != 0
            if name.endswith("bottleneck_up") and config.targets == "kv_both":  # zero yet: where its other factor is
                places = (state[name.replace("_up", "_down")] != 0).T
            elif name.endswith(("up", "_u")):
                places = torch.ones_like(places)
            state[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)) * places
    about = AdapterMetadata("flux", "bottleneck", config.rank, config.alpha, options=config.options)
    save_adapter(path, state, build_metadata(about))
    return state


@pytest.fixture(params=[True, False], ids=["shared", "each its own"])
def config(request):
    return AdapterConfig("bottleneck", rank=2, alpha=4.0, targets="kv_both", shared_bottleneck=request.param)


def test_a_file_comes_back_as_it_was_trained(config, tmp_path):
    state = saved(tmp_path / "a.safetensors", config)
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert loaded.shared == config.shared_bottleneck and loaded.options == config.options
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in state.items())
    assert start_of(loaded, config, "a").state.keys() == state.keys()
    report = inspect_adapter(tmp_path / "a.safetensors")
    assert report.parameters == sum(tensor.numel() for tensor in state.values())
    assert not report.unknown and report.modules == 3


def test_layers_that_share_have_fewer_numbers(tmp_path):
    counts = {}
    for shared in (True, False):
        config = AdapterConfig("bottleneck", rank=4, targets="kv_both", shared_bottleneck=shared)
        saved(tmp_path / "a.safetensors", config)
        counts[shared] = inspect_adapter(tmp_path / "a.safetensors").parameters
    outputs = 3 * H + 3 * H + 7 * H
    assert counts == {True: 2 * 4 * H + outputs + 3 * 2 * 4, False: 2 * 2 * 4 * outputs}


def test_keys_and_values_of_a_fused_layer_are_two_bottlenecks_in_diffusers(config, tmp_path):
    """What is added to the rows of keys is what the bottleneck of keys alone adds to them, and so of values."""
    saved(tmp_path / "a.safetensors", config)
    fused = read_adapter(tmp_path / "a.safetensors").layers
    apart = load_adapter(tmp_path / "a.safetensors", "diffusers")
    assert set(apart.names) == {name for pair in KV.values() for name in pair}
    assert (apart.rank, apart.alpha, apart.options) == (2, 4.0, {})
    for name, pair in KV.items():
        layer = fused[name]
        y = torch.randn(5, layer.outputs)
        added = bottleneck(y, layer.tensors["bottleneck_down"], layer.tensors["bottleneck_up"])
        for number, part in enumerate(pair, start=1):
            own = slice(number * H, (number + 1) * H)
            down, up = (apart.state[f"{part}.bottleneck_{side}"] for side in ("down", "up"))
            torch.testing.assert_close(2.0 * bottleneck(y[:, own], down, up), added[:, own])
            assert added[:, own].abs().max() > 0.01
        rest = torch.cat([added[:, :H], added[:, 3 * H :]], 1)
        assert not rest.any()


def test_a_bottleneck_over_a_whole_fused_layer_has_no_counterpart(tmp_path):
    saved(tmp_path / "a.safetensors", AdapterConfig("bottleneck", rank=4, targets=("qkv",)))
    with pytest.raises(ValueError, match=r"looks at all of them at once.* kv_text or kv_both"):
        load_adapter(tmp_path / "a.safetensors", "diffusers")
    assert load_adapter(tmp_path / "a.safetensors", "native").rank == 4


def test_what_is_shared_is_said_and_read_from_the_header_alone(tmp_path):
    saved(tmp_path / "a.safetensors", AdapterConfig("bottleneck", rank=2, targets="kv_both", shared_bottleneck=True))
    outline, whole = read_outline(tmp_path / "a.safetensors"), read_adapter(tmp_path / "a.safetensors")
    shapes = [
        {name: {part: value.shape for part, value in layer.tensors.items()} for name, layer in file.layers.items()}
        for file in (outline, whole)
    ]
    assert shapes[0] == shapes[1] and not whole.unknown
    assert "shared_bottleneck True" in describe(whole)


def test_without_what_is_shared_a_file_is_incomplete(tmp_path):
    config = AdapterConfig("bottleneck", rank=2, targets="kv_both", shared_bottleneck=True)
    state = saved(tmp_path / "a.safetensors", config)
    about = build_metadata(AdapterMetadata("flux", "bottleneck", 2, options=config.options))
    del state["double_blocks.0.img_attn.qkv.bottleneck_shared_up"]
    with pytest.raises(ValueError, match="tensors that no adapter method has"):
        save_adapter(tmp_path / "b.safetensors", state, about)
