"""Adapters on models: complete, of the right family, or with a message."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy


@pytest.fixture
def loras(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def load(model, name="[from the lora input]", lora=None, clip=None, strength=1.0, **widgets):
    from stylewright.nodes.lora_loader import StyleLoRALoader

    class Node(StyleLoRALoader):
        hidden = type("Hidden", (), {"unique_id": None})

    with torch.inference_mode():
        return Node.execute(model, name, strength, 1.0, lora, clip, **widgets).args[:3]


def state_for(model, names, rank=2, seed=0):
    """peft's tensors of a LoRA on layers of a model."""
    draw, state = torch.Generator().manual_seed(seed), {}
    for name in names:
        outputs, inputs = model.model.diffusion_model.get_submodule(name).weight.shape
        state[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw)
        state[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=draw)
    return state


def saved(path, model, family, names, style, **about):
    from stylewright.training.formats.adapters import save_adapter
    from stylewright.training.formats.metadata import AdapterMetadata, build_metadata

    stated = AdapterMetadata(family=family, method="lora", rank=2, alpha=1.0, style_phrase="wet ink", **about)
    save_adapter(path, state_for(model, names), build_metadata(stated), style)
    return path


def deltas(model, patched):
    """The change of every weight that a model's patches make."""
    found = {}
    for key, patches in patched.patches.items():
        weight = model.model.state_dict()[key]
        found[key] = patched.calculate_weight(patches, weight.clone().float(), key) - weight.float()
    return found


FLUX = ["double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.proj", "single_blocks.0.linear2"]


@pytest.mark.parametrize("style", ["kohya", "comfyui", "diffusers", "peft"])
def test_every_style_lands_complete_and_means_the_same(style, tiny, loras):
    model = tiny("flux")
    saved(loras / "one.safetensors", model, "flux", FLUX, style)
    patched, clip, phrase = load(model, "one.safetensors")
    assert clip is None and phrase == "wet ink"
    assert not model.patches
    found = deltas(model, patched)
    assert found.keys() == {f"diffusion_model.{name}.weight" for name in FLUX}
    state = state_for(model, FLUX)
    for name in FLUX:
        expected = 0.5 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        torch.testing.assert_close(found[f"diffusion_model.{name}.weight"], expected, rtol=1e-4, atol=1e-4)


def test_a_family_without_a_name_of_ours_lands_complete(tiny, loras):
    model, names = tiny("qwen"), ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.txt_mlp.net.2"]
    saved(loras / "one.safetensors", model, "other", names, None)
    patched, _, phrase = load(model, "one.safetensors")
    assert patched.patches.keys() == {f"diffusion_model.{name}.weight" for name in names}
    assert phrase == "wet ink"
    with pytest.raises(ValueError, match="nothing of"):
        load(tiny("flux"), "one.safetensors")


def test_the_attention_layers_of_a_peft_file_for_sd15_are_not_lost(tiny, loras):
    """ComfyUI's own loader places proj_in and drops the rest without a word above the log."""
    import comfy.sd
    import comfy.utils

    model = tiny("sd15")
    names = [
        name
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name and name.startswith("input_blocks.1.")
    ]
    assert any("attn2.to_k" in name for name in names)
    path = saved(loras / "peft.safetensors", model, "sd15", names, "diffusers", unet_layers=1)
    stock, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)
    patched, _, _ = load(model, "peft.safetensors")
    assert len(stock.patches) < len(patched.patches) == len(names)


def test_strength_scales_and_the_link_equals_the_file(tiny, loras):
    from stylewright.nodes.bridge.adapters import read_tensors

    model = tiny("flux")
    path = saved(loras / "one.safetensors", model, "flux", FLUX, "kohya")
    whole, half = load(model, "one.safetensors")[0], load(model, lora=read_tensors(path), strength=0.5)[0]
    plain = load(model, lora=dict(read_tensors(path)))  # as ComfyUI's own trainer gives it
    for key, delta in deltas(model, whole).items():
        torch.testing.assert_close(deltas(model, half)[key], 0.5 * delta)
        torch.testing.assert_close(deltas(model, plain[0])[key], delta)
    assert plain[2] == ""


def test_a_file_of_another_family_is_refused(tiny, loras):
    saved(loras / "flux.safetensors", tiny("flux"), "flux", FLUX, "kohya")
    with pytest.raises(ValueError, match=r"flux\.safetensors is an adapter for the family 'flux'.*SD3"):
        load(tiny("sd3"), "flux.safetensors")


def test_names_that_families_share_tell_nothing_where_all_of_it_fits(tiny, loras):
    """Without metadata a file of these looks like one for SD1.5."""
    name = "diffusion_model.middle_block.1.proj_in"
    size = tiny("sdxl").model.diffusion_model.get_submodule("middle_block.1.proj_in").weight.shape
    save_file(pair(name, *size), loras / "shared.safetensors")
    assert list(load(tiny("sdxl"), "shared.safetensors")[0].patches) == [f"{name}.weight"]
    save_file(pair(name, *size) | pair("diffusion_model.nowhere.1.to_q", 4, 4), loras / "shared.safetensors")
    with pytest.raises(ValueError, match="family 'sd15', and this model is a SDXL"):
        load(tiny("sdxl"), "shared.safetensors")


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_flux_s_kin_take_what_fits_of_a_file_that_looks_like_flux_s(prefix, tiny, loras, caplog):
    """Chroma has FLUX's blocks without their modulations; nothing in such a file says which of them it is for."""
    native = ["double_blocks.0.img_attn.proj", "single_blocks.1.linear2", "double_blocks.1.img_mlp.0"]
    diffusers = ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.1.proj_out"]
    ours = {"diffusion_model.": native, "transformer.": [*diffusers, "transformer_blocks.1.ff.net.0.proj"]}
    places, model = ours["diffusion_model."], tiny("chroma")
    shapes = [model.model.diffusion_model.get_submodule(name).weight.shape for name in places]
    files = {f"{prefix}{name}": size for name, size in zip(ours[prefix], shapes, strict=True)}
    tensors = {key: value for name, size in files.items() for key, value in pair(name, *size).items()}
    gone = "double_blocks.0.img_mod.lin" if prefix == "diffusion_model." else "transformer_blocks.0.norm1.linear"
    save_file(tensors | pair(f"{prefix}{gone}", 384, 64), loras / "kin.safetensors")
    patched = load(model, "kin.safetensors")[0]
    assert sorted(patched.patches) == sorted(f"diffusion_model.{name}.weight" for name in places)
    assert "2 tensors found no place" in caplog.text


def test_what_hardly_fits_another_family_is_refused_by_what_its_names_say(tiny, loras):
    model = tiny("chroma")
    size = model.model.diffusion_model.get_submodule("double_blocks.0.img_attn.proj").weight.shape
    tensors = pair("diffusion_model.double_blocks.0.img_attn.proj", *size)
    for block in range(3):
        tensors |= pair(f"diffusion_model.joint_blocks.{block}.x_block.attn.proj", 64, 64)
    save_file(tensors, loras / "other.safetensors")
    with pytest.raises(ValueError, match=r"is, by the names of its layers, an adapter for the family 'flux'.*Chroma"):
        load(model, "other.safetensors")


def test_a_file_of_hunyuan_video_s_own_names_lands_there_and_nowhere_else(tiny, loras):
    names = {
        "double_blocks.0.img_attn_qkv": "double_blocks.0.img_attn.qkv",
        "double_blocks.1.txt_mlp.fc1": "double_blocks.1.txt_mlp.0",
        "single_blocks.0.linear1": "single_blocks.0.linear1",
    }
    model, tensors = tiny("hunyuan-video"), {}
    for theirs, ours in names.items():
        tensors |= pair(f"transformer.{theirs}", *model.model.diffusion_model.get_submodule(ours).weight.shape)
    save_file(tensors, loras / "film.safetensors")
    patched = load(model, "film.safetensors")[0]
    assert sorted(patched.patches) == sorted(f"diffusion_model.{name}.weight" for name in names.values())
    with pytest.raises(ValueError, match="an adapter for the family 'hunyuan-video', and this model is a Flux"):
        load(tiny("flux"), "film.safetensors")


def test_tensors_without_a_place_are_named(tiny, loras, caplog):
    model = tiny("flux")
    tensors = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": torch.zeros(192, 2),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight": torch.zeros(2, 64),
        "diffusion_model.double_blocks.7.img_attn.qkv.lora_up.weight": torch.zeros(192, 2),
        "diffusion_model.double_blocks.7.img_attn.qkv.lora_down.weight": torch.zeros(2, 64),
    }
    save_file(tensors, loras / "deeper.safetensors")
    patched, _, _ = load(model, "deeper.safetensors")
    assert len(patched.patches) == 1
    assert "2 tensors found no place" in caplog.text and "double_blocks.7.img_attn.qkv.lora_up" in caplog.text


def pair(name, outputs, inputs, rank=2):
    return {f"{name}.lora_up.weight": torch.ones(outputs, rank), f"{name}.lora_down.weight": torch.ones(rank, inputs)}


def test_an_adapter_for_another_size_is_refused(tiny, loras):
    """ComfyUI logs it at the first sampling and draws as if there were no adapter."""
    model = tiny("flux")
    save_file(pair("diffusion_model.double_blocks.0.img_attn.qkv", 9216, 3072), loras / "large.safetensors")
    with pytest.raises(ValueError, match=r"large\.safetensors is for a Flux\w* of another size.*\(192, 64\)"):
        load(model, "large.safetensors")


def test_layers_of_another_size_are_named_and_left_out(tiny, loras, caplog):
    model = tiny("flux")
    fits, does_not = "diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.double_blocks.1.img_attn.qkv"
    save_file({**pair(fits, 192, 64), **pair(does_not, 192, 63)}, loras / "mixed.safetensors")
    patched, _, _ = load(model, "mixed.safetensors")
    assert list(patched.patches) == [f"{fits}.weight"]
    assert "1 layers have another size" in caplog.text and f"{does_not}.weight" in caplog.text


def test_an_adapter_in_float8_loads(tiny, loras):
    model, name = tiny("flux"), "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file(
        {key: tensor.to(torch.float8_e4m3fn) for key, tensor in pair(name, 192, 64).items()}, loras / "8.safetensors"
    )
    assert list(load(model, "8.safetensors")[0].patches) == [f"{name}.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_adapter_is_refused(value, tiny, loras):
    tensors = pair("diffusion_model.double_blocks.0.img_attn.qkv", 192, 64)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, loras / "damaged.safetensors")
    with pytest.raises(ValueError, match=r"damaged\.safetensors holds NaN or infinite values, in .*qkv\.lora_up"):
        load(tiny("flux"), "damaged.safetensors")


def test_no_adapter_and_two_are_told_apart(loras):
    from stylewright.nodes.bridge.adapters import chosen

    with pytest.raises(ValueError, match="there is no adapter: choose a file in lora_name, or link one"):
        chosen(None, None)
    with pytest.raises(ValueError, match=r"two adapters, the file a\.safetensors and the linked one"):
        chosen("a.safetensors", {})


def test_half_a_pair_is_a_damaged_file(tiny, loras):
    tensors = pair("diffusion_model.double_blocks.0.img_attn.qkv", 192, 64)
    tensors |= pair("diffusion_model.double_blocks.1.img_attn.qkv", 192, 64)
    del tensors[next(key for key in tensors if "blocks.1" in key)]
    save_file(tensors, loras / "half.safetensors")
    with pytest.raises(ValueError, match=r"half\.safetensors is damaged: of double_blocks\.1\.img_attn\.qkv one of"):
        load(tiny("flux"), "half.safetensors")


def test_a_layer_that_no_such_model_has_is_counted_in_every_spelling(tiny, loras, caplog):
    path = saved(loras / "more.safetensors", model := tiny("flux"), "flux", FLUX, "diffusers")
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file({**tensors, **pair("transformer.weird.extra", 8, 8)}, path, header)
    load(model, "more.safetensors")
    assert "2 tensors found no place" in caplog.text


@pytest.mark.parametrize(
    "widgets", [{"strength": float("nan")}, {"early": float("inf")}, {"group_strengths": "all = nan"}]
)
def test_strengths_are_numbers(widgets, tiny, loras):
    model = tiny("flux")
    saved(loras / "ours.safetensors", model, "flux", FLUX, "comfyui")
    with pytest.raises(ValueError, match=r"nan|inf"):
        load(model, "ours.safetensors", **widgets)


def test_text_encoder_tensors_are_not_missed_without_a_text_encoder(tiny, loras, caplog):
    model = tiny("flux")
    path = saved(loras / "one.safetensors", model, "flux", FLUX, "kohya")
    from safetensors.torch import load_file

    extra = {
        f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{end}.weight": torch.zeros(2, 2)
        for end in ("up", "down")
    }
    save_file({**load_file(path), **extra}, loras / "two.safetensors")
    load(model, "two.safetensors")
    assert "no place" not in caplog.text


@pytest.mark.parametrize("kind", ["truncated", "foreign", "not a safetensors file", "fits nowhere"])
def test_files_that_are_no_adapters_for_it_are_errors(kind, tiny, loras):
    model, path = tiny("flux"), loras / "bad.safetensors"
    saved(path, model, "flux", FLUX, "kohya")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "foreign":
        save_file({"decoder.weight": torch.zeros(3)}, path)
    elif kind == "not a safetensors file":
        path.write_bytes(b"hello")
    else:
        save_file({f"somewhere.else.lora_{end}.weight": torch.zeros(2, 2) for end in ("up", "down")}, path)
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        load(model, "bad.safetensors")
    assert not model.patches


def test_one_source_has_to_be_chosen(tiny, loras):
    model = tiny("flux")
    path = saved(loras / "one.safetensors", model, "flux", FLUX, "kohya")
    from stylewright.nodes.bridge.adapters import read_tensors

    with pytest.raises(ValueError, match="there is no adapter: choose a file"):
        load(model)
    with pytest.raises(ValueError, match="and the linked one"):
        load(model, "one.safetensors", lora=read_tensors(path))


def test_a_changed_file_is_read_again(tiny, loras):
    from stylewright.nodes.lora_loader import StyleLoRALoader

    path = saved(loras / "one.safetensors", tiny("flux"), "flux", FLUX, "kohya")
    before = StyleLoRALoader.fingerprint_inputs(lora_name="one.safetensors")
    path.write_bytes(path.read_bytes() + b" ")
    assert StyleLoRALoader.fingerprint_inputs(lora_name="one.safetensors") != before
    assert StyleLoRALoader.fingerprint_inputs() is None


def test_the_strengths_are_said():
    from stylewright.nodes.lora_loader import strength_text

    assert strength_text(0.5, None, {}) == "with strength 0.5"
    assert strength_text(1, 0, {"early": 0.0}) == "with strength 1, 0 in the text encoder; times 0 in early"
    assert "nothing at all" in strength_text(0, None, {})
