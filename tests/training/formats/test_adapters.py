"""Adapter files: the weights that an adapter makes are the same before saving and after loading, in every style."""

import dataclasses
import json
import pickle

import pytest
import torch
from adapter_models import METHODS, NATIVE, adapted_weights, as_diffusers, make_tree, metadata_for, train
from safetensors.torch import load_file, save_file

from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.formats.adapters import convert_adapter, inspect_adapter, load_adapter, save_adapter
from stylewright.training.formats.contents import read_adapter
from stylewright.training.formats.keys import diffusers_names
from stylewright.training.formats.layers import product
from stylewright.training.formats.spelling import STYLES

LAYOUTS = ("diffusers", "native")


def styles_for(method):
    return [style for style in STYLES if (method, style) != ("oft", "diffusers")]


def everything(name, layer):
    return True


def linear_or_pointwise(name, layer):
    return layer.weight[0].numel() == layer.weight.shape[1]


def not_cut_through(name, layer):
    return not name.endswith(("qkv", "linear1"))


KEEP = {"oft": linear_or_pointwise, "lokr": not_cut_through}  # what can be written in every style


def save(path, family, config, state, tree, style=None, **more):
    save_adapter(path, state, metadata_for(family, config, **more), style, weights=tree.weight)


def weights_of(loaded, tree):
    """What peft makes of a loaded adapter on this tree."""
    targets = tuple(name.replace(".", r"\.") for name in loaded.names)
    config = AdapterConfig(method=loaded.method, rank=loaded.rank, alpha=loaded.alpha, targets=targets)
    return adapted_weights(tree, config, loaded.family, loaded.state)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", NATIVE)
def test_round_trip_in_every_style(tmp_path, family, layout, method):
    keep = KEEP.get(method, everything)
    tree, config, state, wanted = train(family, layout, method, keep)
    left = {name for name, weight in tree.weights().items() if torch.allclose(weight, wanted[name], atol=1e-4)}
    assert left == {name for name in tree.names if not keep(name, tree.get_submodule(name))}
    for style in styles_for(method):
        save(tmp_path / "adapter.safetensors", family, config, state, tree, style)
        loaded = load_adapter(tmp_path / "adapter.safetensors", weights=tree.weight)
        assert (loaded.layout, loaded.family, loaded.method) == (layout, family, method)
        assert (loaded.rank, loaded.alpha) == (config.rank, config.alpha)
        assert loaded.state.keys() == state.keys()
        assert_same(weights_of(loaded, tree), wanted)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("family", NATIVE)
def test_the_other_layout_gets_the_same_weights(tmp_path, family, method):
    path = tmp_path / "adapter.safetensors"
    tree, config, state, native = train(family, "native", method)
    other = make_tree(family, "diffusers")
    for style in ("kohya", "comfyui"):
        save(path, family, config, state, tree, style)
        loaded = load_adapter(path, "diffusers", weights=other.weight)
        assert loaded.layout == "diffusers"
        assert_same(weights_of(loaded, other), as_diffusers(family, native))


def test_lokr_that_fused_parts_cut_through(tmp_path):
    """72 rows are 8 blocks of 9, and q, k and v have 24 each; native names keep it whole."""
    path = tmp_path / "adapter.safetensors"
    tree, config, state, _ = train("flux", "native", "lokr")
    with pytest.raises(ValueError, match=r"blocks of 9 rows, .* only be written under native names"):
        save(path, "flux", config, state, tree, "diffusers")
    assert not path.exists()


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "loha"])
@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_parts_become_one_fused_adapter(tmp_path, family, method):
    path = tmp_path / "adapter.safetensors"
    tree, config, state, wanted = train(family, "diffusers", method)
    save(path, family, config, state, tree, "kohya")
    native = make_tree(family, "native")
    loaded = load_adapter(path, "native", weights=native.weight)
    assert set(loaded.names) == set(native.names)
    assert_same(as_diffusers(family, weights_of(loaded, native)), wanted)


@pytest.mark.parametrize("method", ["lora", "loha", "lokr"])
def test_some_parts_of_a_fused_layer(tmp_path, method):
    path = tmp_path / "adapter.safetensors"
    tree, config, state, wanted = train("flux", "diffusers", method, lambda name, _: name.endswith(("to_q", "to_v")))
    save(path, "flux", config, state, tree, "kohya")
    loaded = load_adapter(path)
    assert loaded.state.keys() == state.keys()
    assert_same(weights_of(loaded, tree), wanted)
    if method != "lokr":  # which has no fused form
        fused = load_file(path)
        assert {key.split(".")[0] for key in fused} == {
            "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
        }  # fmt: skip
        native = make_tree("flux", "native")
        split = as_diffusers("flux", weights_of(load_adapter(path, "native"), native))
        assert_same({name: split[name] for name in wanted}, wanted)


def test_dora_of_some_parts_stays_apart(tmp_path):
    path = tmp_path / "adapter.safetensors"
    tree, config, state, _ = train("flux", "diffusers", "dora", lambda name, _: name.endswith("attn.to_q"))
    save(path, "flux", config, state, tree)
    names = {key.removesuffix(".alpha") for key in load_file(path) if key.endswith(".alpha")}
    assert names == {f"transformer.{kind}_blocks.0.attn.to_q" for kind in ("transformer", "single_transformer")}


def test_a_fresh_adapter_comes_back_as_it_is(tmp_path):
    """All of B is zero, and a merged one still comes apart into what was trained."""
    path = tmp_path / "adapter.safetensors"
    tree, config, state, _ = train("flux", "diffusers", "lora")
    fresh = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in state.items()}
    save(path, "flux", config, fresh, tree, "kohya")
    loaded = load_adapter(path)
    assert loaded.rank == config.rank
    assert all(torch.equal(loaded.state[name], value) for name, value in fresh.items())


def test_a_fresh_rotation_keeps_its_parts_apart(tmp_path):
    """All rotations are the identity then, and equal; the form in the file has the rows of one part."""
    path = tmp_path / "adapter.safetensors"
    tree, config, state, _ = train("flux", "diffusers", "oft")
    fresh = {name: torch.zeros_like(value) for name, value in state.items()}
    save(path, "flux", config, fresh, tree, "kohya")
    assert load_file(path)["transformer.transformer_blocks.0.attn.to_q.b1.weight"].shape == (24, 1)
    assert load_adapter(path).state.keys() == state.keys()


@pytest.mark.parametrize("method", ["rslora", "dora", "loha", "oft"])
def test_conversion_is_as_if_saved_so(tmp_path, method):
    tree, config, state, _ = train("flux", "diffusers", method)
    saved = {style: tmp_path / f"{style}.safetensors" for style in styles_for(method)}
    for style, path in saved.items():
        save(path, "flux", config, state, tree, style, style_phrase="melting gold")
    converted = tmp_path / "converted.safetensors"
    for source in saved.values():
        for style, path in saved.items():
            convert_adapter(source, converted, style, weights=tree.weight)
            assert_same(load_file(converted), load_file(path))
            assert inspect_adapter(converted).metadata == inspect_adapter(path).metadata


def test_best_styles(tmp_path):
    expected = {"flux": "diffusers", "sd3": "diffusers", "pixart": "diffusers", "sd15": "kohya", "sdxl": "kohya"}
    for family, style in expected.items():
        tree, config, state, _ = train(family, "native", "lora")
        save(tmp_path / "adapter.safetensors", family, config, state, tree)
        assert inspect_adapter(tmp_path / "adapter.safetensors").style == style, family


def flux1_state(rank=2):
    """Trained on FLUX.1's own width, which diffusers' reader of kohya's spelling takes for granted."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "transformer_blocks.0.attn.to_q": (3072, 3072),
        "transformer_blocks.0.attn.to_k": (3072, 3072),
        "transformer_blocks.0.attn.to_v": (3072, 3072),
        "single_transformer_blocks.0.attn.to_q": (3072, 3072),
        "single_transformer_blocks.0.attn.to_k": (3072, 3072),
        "single_transformer_blocks.0.attn.to_v": (3072, 3072),
        "single_transformer_blocks.0.proj_mlp": (3072, 12288),
        "single_transformer_blocks.0.proj_out": (15360, 3072),
    }
    state = {}
    for name, (inputs, outputs) in shapes.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return state


def test_kohya_names_of_flux(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, flux1_state(), metadata_for("flux", AdapterConfig(rank=2, alpha=5.0)))
    tensors = load_file(path)
    assert set(tensors) == {
        f"lora_unet_{layer}.{end}"
        for layer in ("double_blocks_0_img_attn_qkv", "single_blocks_0_linear1", "single_blocks_0_linear2")
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (6, 3072)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (21504, 8)
    alphas = {key: value.item() for key, value in tensors.items() if key.endswith(".alpha")}
    assert sorted(alphas.values()) == [5.0, 15.0, 20.0]  # 2.5 times the rank


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kohya_names_of_unets(tmp_path, layout):
    """sd-scripts trains SD1.5 under diffusers names and SDXL under native ones."""
    expected = {
        "sd15": {
            "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
            "up_blocks_0_upsamplers_0_conv",
            "conv_in",
        },
        "sdxl": {"input_blocks_4_1_transformer_blocks_0_attn2_to_k", "output_blocks_2_2_conv", "input_blocks_0_0"},
    }
    for family, names in expected.items():
        tree, config, state, _ = train(family, layout, "lora")
        save(tmp_path / "adapter.safetensors", family, config, state, tree)
        tensors = load_file(tmp_path / "adapter.safetensors")
        assert {f"lora_unet_{name}.alpha" for name in names} <= set(tensors)
        assert len(tensors) == 3 * len(tree.names)


@pytest.mark.parametrize("style", STYLES)
def test_the_scale_is_in_the_file(tmp_path, style):
    """alpha / rank for LoRA, alpha / sqrt(rank) for rsLoRA: as ``.alpha``, or in the tensors."""
    for method, scale in {"lora": 5 / 3, "rslora": 5 / 3**0.5}.items():
        tree, config, state, _ = train("sd15", "diffusers", method)
        path = tmp_path / "adapter.safetensors"
        save(path, "sd15", config, state, tree, style)
        report = inspect_adapter(path)
        assert report.ranks == (3,)
        assert report.alphas == pytest.approx((3 * scale if style in ("kohya", "comfyui") else 3.0,))
        stated = json.loads(report.metadata["stylewright.alpha"])
        assert stated == config.alpha


@pytest.mark.parametrize("method", ["lora", "rslora", "lokr", "loha"])
def test_files_mean_what_peft_computed(tmp_path, method):
    """The products in the file, with its own alphas, are what peft adds: also where the scale is in the tensors."""
    path = tmp_path / "adapter.safetensors"
    tree, config, state, wanted = train("sd15", "native", method)
    for style in STYLES:
        save(path, "sd15", config, state, tree, style)
        layers = read_adapter(path).layers
        for name, weight in wanted.items():
            layer = layers.get(name) or layers[diffusers_names("sd15", name)[0]]
            torch.testing.assert_close(
                product(layer), (weight - tree.weight(name)).flatten(1), atol=1e-6, rtol=1e-4, msg=f"{style}: {name}"
            )


def test_a_file_of_another_tool(tmp_path):
    """sd-scripts: ranks and alphas differ from layer to layer, a text encoder came along, and some tensors are odd."""
    path = tmp_path / "foreign.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rank, alpha in (("img_attn_qkv", 4, 2.0), ("img_attn_proj", 2, 2.0)):
        outputs = 72 if name.endswith("qkv") else 24
        key = f"lora_unet_double_blocks_0_{name}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, 24, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(outputs, rank, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    delta = {
        name: a
        / r
        * tensors[f"lora_unet_double_blocks_0_{name}.lora_up.weight"]
        @ tensors[f"lora_unet_double_blocks_0_{name}.lora_down.weight"]
        for name, r, a in (("img_attn_qkv", 4, 2.0), ("img_attn_proj", 2, 2.0))
    }
    encoder = "lora_te1_text_model_encoder_layers_3_self_attn_q_proj"
    tensors |= {f"{encoder}.lora_down.weight": torch.ones(2, 8), f"{encoder}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, path, {"ss_base_model_version": "flux1", "modelspec.trigger_phrase": "in gold"})
    report = inspect_adapter(path)
    assert (report.family, report.style, report.layout, report.method) == ("flux", "kohya", "native", "lora")
    assert (report.modules, report.text_encoder_modules, report.ranks) == (3, 1, (2, 4))
    assert (report.alphas, report.trigger, report.unknown) == ((2.0,), "in gold", ())

    loaded = load_adapter(path, "diffusers")
    assert loaded.rank == 4
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        product = (
            loaded.state[f"transformer_blocks.0.attn.{name}.lora_B.weight"]
            @ loaded.state[f"transformer_blocks.0.attn.{name}.lora_A.weight"]
        )
        torch.testing.assert_close(
            loaded.alpha / loaded.rank * product, delta["img_attn_qkv"][24 * part : 24 * part + 24]
        )

    convert_adapter(path, tmp_path / "diffusers.safetensors", "diffusers")
    converted = load_file(tmp_path / "diffusers.safetensors")
    assert "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight" in converted
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    torch.testing.assert_close(
        converted[f"{name}.lora_B.weight"] @ converted[f"{name}.lora_A.weight"], delta["img_attn_proj"]
    )
    convert_adapter(tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors", "kohya")
    assert f"{encoder}.lora_up.weight" in load_file(tmp_path / "back.safetensors")


def test_unknown_tensors_are_listed_and_never_dropped(tmp_path):
    path = tmp_path / "odd.safetensors"
    tree, config, state, _ = train("sd15", "native", "lora")
    save(path, "sd15", config, state, tree)
    tensors = load_file(path)
    lone = "lora_unet_conv_out.lora_up.weight"
    save_file({**tensors, "lora_unet_conv_out.diff_b": torch.ones(3), lone: torch.ones(3, 2)}, path)
    assert set(inspect_adapter(path).unknown) == {"lora_unet_conv_out.diff_b", lone}
    for use in (lambda: load_adapter(path), lambda: convert_adapter(path, tmp_path / "new.safetensors", "comfyui")):
        with pytest.raises(ValueError, match=r"odd\.safetensors has 2 tensors .*conv_out"):
            use()
    assert not (tmp_path / "new.safetensors").exists()


def test_report_is_plain_data(tmp_path):
    tree, config, state, _ = train("flux", "diffusers", "dora")
    path = tmp_path / "adapter.safetensors"
    save(path, "flux", config, state, tree, style_phrase="melting gold", steps=12)
    report = inspect_adapter(path)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["style_phrase"] == "melting gold"
    assert (report.method, report.layout, report.format_version) == ("dora", "native", 1)
    assert report.tensors == len(load_file(path)) == 4 * report.modules
    assert report.parameters == sum(value.numel() for value in load_file(path).values())


def test_dtype_is_of_the_weights_alone(tmp_path):
    _, config, state, _ = train("sdxl", "native", "lora")
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, state, metadata_for("sdxl", config), dtype=torch.bfloat16)
    assert {value.dtype for key, value in load_file(path).items() if key.endswith(".alpha")} == {torch.float32}
    assert {value.dtype for key, value in load_file(path).items() if not key.endswith(".alpha")} == {torch.bfloat16}


@pytest.mark.parametrize("use", [load_adapter, inspect_adapter])
def test_what_is_no_adapter(tmp_path, use):
    tree, config, state, _ = train("sd15", "native", "lora")
    save(tmp_path / "whole.safetensors", "sd15", config, state, tree)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    (tmp_path / "start.safetensors").write_bytes(whole[:200])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"lora": 1}))
    save_file({"model.weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    for name in ("cut", "start", "empty", "pickle", "foreign"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors .*adapter"):
            use(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: expected an adapter"):
        use(tmp_path / "none.safetensors")


def test_refused_before_anything_is_written(tmp_path):
    _, config, state, _ = train("sd15", "native", "lora")
    path = tmp_path / "adapter.safetensors"
    metadata = metadata_for("sd15", config)
    with pytest.raises(ValueError, match="'a1111': expected one of kohya, comfyui, diffusers, peft"):
        save_adapter(path, state, metadata, "a1111")
    with pytest.raises(ValueError, match="build_metadata"):
        save_adapter(path, state, {})
    with pytest.raises(ValueError, match=r"no adapter method has: model\.bias"):
        save_adapter(path, {**state, "model.bias": torch.ones(2)}, metadata)
    with pytest.raises(ValueError, match="no layer of the family"):
        save_adapter(path, state, metadata_for("flux", config))
    _, config, state, _ = train("flux", "diffusers", "oft")
    with pytest.raises(ValueError, match="with the base model at hand"):
        save_adapter(path, state, metadata_for("flux", config), "kohya")
    with pytest.raises(ValueError, match="diffusers reads no OFT"):
        save_adapter(path, state, metadata_for("flux", config), "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_without_the_base_weights(tmp_path):
    """OFT goes to peft's style by itself; a DoRA for ComfyUI cannot be read in other ways."""
    path = tmp_path / "adapter.safetensors"
    tree, config, state, _ = train("flux", "diffusers", "oft")
    save_adapter(path, state, metadata_for("flux", config))
    assert inspect_adapter(path).style == "peft"
    tree, config, state, _ = train("flux", "diffusers", "dora")
    save(path, "flux", config, state, tree)
    with pytest.raises(ValueError, match="base model's weights"):
        load_adapter(path)
    save_adapter(path, state, metadata_for("flux", config))  # the paper's norm: approximately right in ComfyUI
    assert load_adapter(path).state.keys() == state.keys()


def test_a_family_without_tables(tmp_path):
    """Native names of any model can be written and read back; they cannot be renamed."""
    path = tmp_path / "adapter.safetensors"
    state = {
        "blocks.0.some_layer.lora_A.weight": torch.ones(2, 6),
        "blocks.0.some_layer.lora_B.weight": torch.ones(5, 2),
    }
    save_adapter(path, state, metadata_for("other", AdapterConfig(rank=2)))
    assert "diffusion_model.blocks.0.some_layer.lora_down.weight" in load_file(path)
    loaded = load_adapter(path)
    assert (loaded.family, set(loaded.state)) == ("other", set(state))
    with pytest.raises(ValueError, match="'other' models are known in one style only"):
        convert_adapter(path, tmp_path / "new.safetensors", "diffusers")


def test_unet_with_other_numbers_of_layers(tmp_path):
    path = tmp_path / "adapter.safetensors"
    name = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"  # a resampling block, if there are two layers a level
    state = {f"{name}.lora_A.weight": torch.ones(2, 6), f"{name}.lora_B.weight": torch.ones(5, 2)}
    with pytest.raises(ValueError, match=r"UNet with 2 residual layers.*unet_layers"):
        save_adapter(path, state, metadata_for("sd15", AdapterConfig(rank=2)))
    save_adapter(path, state, metadata_for("sd15", AdapterConfig(rank=2), unet_layers=1))
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in load_file(path)
    assert set(load_adapter(path).state) == set(state)
