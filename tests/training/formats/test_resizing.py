"""Lower ranks: the best there is, layer by layer, and what is lost is what is said."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylewright.training.formats.adapters import inspect_adapter
from stylewright.training.formats.contents import read_adapter, read_outline
from stylewright.training.formats.description import describe
from stylewright.training.formats.layers import Layer, product
from stylewright.training.formats.resizing import Cut, as_lora, resize_adapter, resize_layer


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(rank=6, outputs=20, inputs=14, scale=0.5, **kernel):
    shape = kernel.get("kernel", ())
    b = random(outputs, rank, *[1] * len(shape), seed=1)
    return Layer("lora", {"A": random(rank, inputs, *shape), "B": b}, scale)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("rank", [1, 4, 6, 9])
def test_it_is_the_best_of_its_rank(kernel, rank):
    layer = lora(kernel=kernel)
    weight = product(layer).double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    small, kept = resize_layer(layer, Cut(value=rank))
    assert small.rank == min(rank, 6) and small.scale == 1
    assert small.tensors["A"].shape[1:] == layer.tensors["A"].shape[1:]
    torch.testing.assert_close(product(small).double(), best, rtol=1e-5, atol=1e-5)
    lost = (product(small).double() - weight).square().sum() / weight.square().sum()
    assert 1 - kept == pytest.approx(lost.item(), abs=1e-6)


def test_ranks_by_energy_and_by_ratio():
    values = torch.tensor([10.0, 5.0, 1.0, 0.0])  # squares: 100, 125, 126
    assert [Cut("energy", share).rank(values) for share in (0, 0.7, 0.9, 1)] == [1, 1, 2, 3]
    assert [Cut("ratio", ratio).rank(values) for ratio in (1, 2, 9, 11)] == [1, 2, 2, 3]
    assert Cut("energy", 1.0, most=2).rank(values) == 2
    for by, value in (("rank", 0), ("energy", 1.1), ("ratio", 0.5), ("size", 1)):
        with pytest.raises(ValueError, match="expected"):
            Cut(by, value)


@pytest.mark.parametrize(
    "layer",
    [
        Layer("loha", {f"hada_w{i}_{s}": random(*((12, 2) if s == "a" else (2, 10)), seed=ord(s) * int(i))
                       for i in "12" for s in "ab"}, 0.5),
        Layer("loha", {"hada_w1_a": random(12, 5), "hada_w1_b": random(5, 10), "hada_w2_a": random(12, 5, seed=1),
                       "hada_w2_b": random(5, 10, seed=2)}),
        Layer("lokr", {"lokr_w1": random(3, 2), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 5)}, 0.5),
        Layer("lokr", {"lokr_w1": random(3, 2), "lokr_w2": random(4, 3, 3, 3)}),
    ],
)  # fmt: skip
def test_other_products_become_the_lora_that_they_are(layer):
    torch.testing.assert_close(product(as_lora("x", layer)), product(layer), rtol=1e-4, atol=1e-4)


def test_a_rotation_has_no_rank():
    with pytest.raises(ValueError, match="the layer x is oft"):
        as_lora("x", Layer("oft", {"oft_R": random(2, 6)}))


@pytest.fixture
def file(tmp_path):
    tensors = {}
    for index in range(2):
        name = f"lora_unet_double_blocks_{index}_img_attn_proj"
        tensors |= {f"{name}.lora_down.weight": random(6, 16, seed=index), f"{name}.alpha": torch.tensor(3.0)}
        tensors[f"{name}.lora_up.weight"] = random(16, 6, seed=index + 5)
    header = {
        "ss_network_dim": "6", "ss_network_alpha": "3.0", "ss_steps": "1200", "ss_num_train_images": "7",
        "ss_tag_frequency": '{"5_x": {"blue": 3, "ink": 9}}', "other": "stays",
    }  # fmt: skip
    save_file(tensors, tmp_path / "one.safetensors", header)
    return tmp_path / "one.safetensors"


def test_a_file_keeps_its_names_and_what_it_says(file, tmp_path):
    target = tmp_path / "small.safetensors"
    resized = resize_adapter(file, target, Cut(value=2))
    before, after = read_adapter(file), read_adapter(target)
    assert load_file(file).keys() == load_file(target).keys()
    assert after.header["other"] == "stays" and after.header["ss_network_dim"] == "2"
    for name, layer in after.layers.items():
        assert layer.rank == 2
        whole = product(before.layers[name])
        lost = (product(layer) - whole).square().sum() / whole.square().sum()
        assert 1 - resized.kept[name] == pytest.approx(lost.item(), abs=1e-5)
    assert f"{100 * (1 - resized.energy):.2g} %" in after.header["stylewright.resized"]


def test_what_a_file_of_another_tool_is(file):
    text = describe(read_adapter(file))
    for part in ("lora, rank 6, alpha 3: 2 layers", "for flux", "1200 steps", "on 7 pictures", "captions: ink, blue"):
        assert part in text
    assert describe(read_outline(file)) == text
    assert inspect_adapter(file).ranks == (6,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named_with_their_layer(value, file, tmp_path):
    tensors = load_file(file)
    tensors["lora_unet_double_blocks_1_img_attn_proj.lora_up.weight"][3, 2] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinite values are in double_blocks[._]1"):
        resize_adapter(tmp_path / "bad.safetensors", tmp_path / "small.safetensors", Cut(value=2))
    assert not (tmp_path / "small.safetensors").exists()
