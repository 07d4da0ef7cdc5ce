"""What the page is told of an adapter's file: of listed files only, from their header, and what is wrong with them."""

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy


@pytest.fixture
def loras(tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "loras" / "mine").mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    return tmp_path / "loras"


def write(path):
    """A LoRA of kohya's spelling for FLUX."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    weights = {f"{name}.lora_down.weight": torch.rand(4, 16), f"{name}.lora_up.weight": torch.rand(48, 4)}
    save_file(weights | {f"{name}.alpha": torch.tensor(2.0)}, path, {"ss_steps": "12"})


def test_a_listed_file_is_described_without_its_values(loras):
    from stylewright.nodes.bridge.outlines import outline

    write(loras / "mine" / "one.safetensors")
    found = outline("mine/one.safetensors")
    assert not found["failed"]
    assert "lora, rank 4, alpha 2: 1 layers" in found["text"] and "12 steps" in found["text"]


def test_what_is_wrong_with_a_file_is_said(loras):
    from stylewright.nodes.bridge.outlines import outline

    (loras / "cut.safetensors").write_bytes(b"\x00" * 5)
    save_file({"some.weight": torch.rand(2, 2)}, loras / "other.safetensors")
    cut = outline("cut.safetensors")
    assert cut["failed"] and cut["text"].startswith("cut.safetensors is cut off")
    assert outline("other.safetensors")["failed"] and "is not an adapter" in outline("other.safetensors")["text"]


@pytest.mark.parametrize(
    "name", ["", "[from the lora input]", "../secret.safetensors", "mine/../../secret.safetensors"]
)
def test_nothing_is_said_of_what_no_list_names(name, loras):
    from stylewright.nodes.bridge.outlines import outline

    write(loras.parent / "secret.safetensors")
    assert outline(name) == outline(str(loras.parent / "secret.safetensors")) == {"text": "", "failed": False}
