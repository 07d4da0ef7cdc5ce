"""A student of which all weights learned, in ComfyUI's stock loader."""

import pytest
import torch

pytestmark = pytest.mark.comfy


def test_the_stock_loader_opens_its_file_as_the_core_does(embedded, random_weights, tmp_path, monkeypatch):
    import folder_paths
    import nodes

    from stylewright.nodes.bridge.host import comfy_host
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.embedded.weights import Weights
    from stylewright.training.formats.metadata import FULL, AdapterMetadata
    from stylewright.training.formats.whole import save_whole
    from stylewright.training.hosts.embedded import load_embedded
    from stylewright.training.hosts.whole import with_weights

    host, draw = load_embedded(Weights(random_weights)), torch.Generator().manual_seed(1)
    module = host.denoiser.module
    state = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=draw) for name, tensor in module.state_dict().items()
    }
    about = AdapterMetadata("flux", FULL, 1, process="flow", prediction="flow")
    save_whole(tmp_path / "student.safetensors", state, about)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    x_t, levels = torch.randn(3, 16, 8, 12, generator=draw), torch.tensor([-6.0, -1.0, 4.0])
    texts = ["star in <v0> style", "", "house in ocean dots style"]
    told = host.encode_prompts(texts)
    with torch.no_grad():
        plain = host.denoiser(x_t, levels, told)
        with with_weights(host.denoiser, tmp_path / "student.safetensors", about):
            expected = host.denoiser(x_t, levels, told)
        assert torch.equal(host.denoiser(x_t, levels, told), plain)
    with torch.inference_mode():
        (model,) = nodes.UNETLoader().load_unet("student.safetensors", "default")
        ours = comfy_host(model, embedded.clip, embedded.vae, resolution=128)
        with training_session(model), torch.no_grad():
            found = ours.denoiser(x_t, levels, ours.encode_prompts(texts))
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_sampler_knows_how_it_is_called_where_comfyui_remembers_the_file(
    embedded, random_weights, tmp_path, monkeypatch
):
    """And it is no teacher. Another model's file says nothing of the kind."""
    import folder_paths
    import nodes

    from stylewright.nodes.bridge.students import preset_of, refuse_as_teacher
    from stylewright.training.embedded.weights import Weights
    from stylewright.training.formats.metadata import FULL, AdapterMetadata
    from stylewright.training.formats.whole import save_whole
    from stylewright.training.hosts.embedded import load_embedded

    host = load_embedded(Weights(random_weights))
    called = {"level": 0.75, "unit": "sigma", "prediction": "flow", "start": "unit"}
    about = AdapterMetadata("flux", FULL, 1, process="flow", prediction="flow", resolution=128, one_step=called)
    state = host.denoiser.module.state_dict()
    save_whole(tmp_path / "student.safetensors", state, about)
    save_whole(tmp_path / "other.safetensors", state, AdapterMetadata("flux", FULL, 1))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    with torch.inference_mode():
        student, other = (
            nodes.UNETLoader().load_unet(f"{name}.safetensors", "default")[0] for name in ("student", "other")
        )
    for model in (other, embedded.model):
        refuse_as_teacher(model)
        with pytest.raises(ValueError, match="no file on this model says"):
            preset_of(model)
    if hasattr(student, "cached_patcher_init"):
        preset = preset_of(student.clone())
        assert (preset.levels(1)[0], preset.side, preset.prediction) == (0.75, 128, "flow")
        with pytest.raises(ValueError, match=r"one-step student on it \(student.safetensors\)"):
            refuse_as_teacher(student)
    else:
        with pytest.raises(ValueError, match="of a ComfyUI that remembers the file"):
            preset_of(student)
