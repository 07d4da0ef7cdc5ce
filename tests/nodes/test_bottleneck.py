"""FineStyle's bottleneck through the loader: what training computes, also behind layers that stack several."""

import pytest
import torch
from negative_proof import draw

pytestmark = pytest.mark.comfy

FAMILIES = {"sd15": "kv_text", "flux": "kv_both", "sd3": "kv_text"}


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize("shared", [False, True], ids=["each its own", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loader_gives_what_training_computes(family, shared, tiny, tiny_prompt, tmp_path):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors
    from stylewright.nodes.bridge.families import unet_layers
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.formats.adapters import save_adapter
    from stylewright.training.formats.metadata import AdapterMetadata, build_metadata

    model, prompt = tiny(family), tiny_prompt(family, 5, 1)
    config = AdapterConfig("bottleneck", rank=3, alpha=6.0, targets=FAMILIES[family], shared_bottleneck=shared)
    base = draw(model, family, prompt)
    with attached(model.model.diffusion_model, config, family=family, seed=0) as adapter:
        assert torch.equal(draw(model, family, prompt), base)  # nothing at the start
        state = adapter.state_dict()
        for i, (name, tensor) in enumerate(state.items()):
            places = tensor != 0
            if name.endswith(("shared_up", "_u")):  # zero at the start
                places = torch.ones_like(tensor)
            elif name.endswith("up"):  # and this one, elsewhere for good: where its other factor is
                places = (state[name.replace("_up", "_down")] != 0).T
            state[name] = random(*tensor.shape, seed=i) * places * 3
        adapter.load_state_dict(state)
        expected = draw(model, family, prompt)
        path = tmp_path / "bottleneck.safetensors"
        about = AdapterMetadata(
            family, "bottleneck", 3, 6.0, (FAMILIES[family],), unet_layers=unet_layers(model), options=config.options
        )
        save_adapter(path, adapter.state_dict(), build_metadata(about))
    lora = read_tensors(path)
    assert lora.file.unmergeable and not lora.file.unknown
    with torch.inference_mode():
        applied = apply_adapter(model, None, lora, Strengths(1.0), warn=pytest.fail).model
    change = (expected - base).norm()
    assert change > 1e-3 * base.norm()
    assert (draw(applied, family, prompt) - expected).norm() < 1e-3 * change
    assert torch.equal(draw(model, family, prompt), base)
