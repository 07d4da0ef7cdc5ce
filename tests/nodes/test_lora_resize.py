"""The node that lowers ranks, and the loader's strengths by part of a model."""

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy
FLUX = ["double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.proj", "single_blocks.0.linear2", "txt_in"]


@pytest.fixture
def loras(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture
def file(loras, tiny):
    """A LoRA of rank 6 for the tiny FLUX, in ComfyUI's spelling."""
    draw, tensors = torch.Generator().manual_seed(3), {}
    for name in FLUX:
        outputs, inputs = tiny("flux").model.diffusion_model.get_submodule(name).weight.shape
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(6, inputs, generator=draw)
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(outputs, 6, generator=draw)
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, loras / "one.safetensors", {"ss_steps": "12"})
    return "one.safetensors"


def node(kind):
    return type("Node", (kind,), {"hidden": type("Hidden", (), {"unique_id": None})})


def resize(name="[from the lora input]", by="rank", rank=2, energy=0.9, ratio=10.0, save="", lora=None):
    from stylewright.nodes.lora_resize import StyleLoRAResize

    with torch.inference_mode():
        return node(StyleLoRAResize).execute(name, by, rank, energy, ratio, save, lora).args


def load(model, name="[from the lora input]", lora=None, **widgets):
    from stylewright.nodes.lora_loader import StyleLoRALoader

    with torch.inference_mode():
        return node(StyleLoRALoader).execute(model, name, 1.0, 1.0, lora, None, **widgets).args


def deltas(model, patched):
    state = model.model.state_dict()
    return {
        key: patched.calculate_weight(patches, state[key].clone(), key) - state[key]
        for key, patches in patched.patches.items()
    }


def test_a_lower_rank_of_a_file_and_of_a_link(file, loras, tiny):
    model = tiny("flux")
    lora, info = resize(file, save="styles/small %rank%")
    assert "rank 2 in 4 layers" in info and "saved as small 2_00001_.safetensors" in info and "12 steps" in info
    whole, small = (deltas(model, load(model, **source)[0]) for source in ({"name": file}, {"lora": lora}))
    again = deltas(model, load(model, "styles/small 2_00001_.safetensors")[0])
    for key, delta in whole.items():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best = (left[:, :2] * values[:2]) @ right[:2]
        torch.testing.assert_close(small[key], best, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(again[key], best, rtol=1e-3, atol=1e-3)
    assert resize(lora=lora, by="ratio of singular values", rank=64)[0].keys() == lora.keys()


def test_every_group_has_its_strength(file, tiny):
    model = tiny("flux")
    whole = deltas(model, load(model, file)[0])
    widgets = {
        "attention": 0.5,
        "early": 0.5,
        "group_strengths": "text = 0\ntxt_in = -2\n# nothing\nsingle_blocks.0-3 = 3",
    }
    patched, _, _, info = load(model, file, **widgets)
    found = deltas(model, patched)
    factors = dict(zip(FLUX, (0.25, 0, 3, -2), strict=True))
    assert len(found) == 3, "no patch where the strength is 0"
    for name, factor in factors.items():
        key = f"diffusion_model.{name}.weight"
        torch.testing.assert_close(found.get(key, torch.zeros(1)), factor * whole[key] if factor else torch.zeros(1))
    assert "lora, rank 6, alpha 3" in info
    assert "no layers in mlp, whose strength changes nothing" in load(model, file, mlp=0.0)[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img_stream = 1", "'img_stream' is no group.*the groups are all, early, .*double_blocks.*img_attn.qkv"),
        ("late", "expected lines such as"),
        ("late = much", "expected lines such as"),
    ],
)
def test_a_group_that_does_not_exist_is_an_error(text, message, file, tiny):
    with pytest.raises(ValueError, match=message):
        load(tiny("flux"), file, group_strengths=text)


def test_a_window_is_said_on_the_node_and_nothing_is_distilled_under_it(file, tiny):
    from stylewright.nodes.bridge.starting import refuse_windowed

    model = tiny("flux")
    patched, _, _, info = load(model, file, window="where style is made")
    assert "acts at log_snr below -6.52" in info and not patched.patches
    assert "from -3 below 20" in load(model, file, window="from window_low to window_high", window_low=-3.0,
                                      window_high=19.9)[3].replace("19.9", "20")  # fmt: skip
    refuse_windowed(model)
    with pytest.raises(ValueError, match="link the model from before it"):
        refuse_windowed(patched)
    with pytest.raises(ValueError, match="expected the noisier, smaller number first"):
        load(model, file, window="from window_low to window_high", window_low=3.0, window_high=-3.0)
