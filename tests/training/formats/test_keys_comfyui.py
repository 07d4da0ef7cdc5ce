"""One set of weights in ComfyUI's FLUX and in diffusers': the same answers."""

import pytest
import torch

from stylewright.training.formats.keys_flux import flux_to_original
from stylewright.training.hosts.flux import image_ids, pack, unpack

pytestmark = pytest.mark.comfy


def test_flux_gives_the_same_output():
    import comfy.model_detection
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from diffusers import FluxTransformer2DModel

    ours = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    original = flux_to_original(ours.state_dict())
    detected = comfy.model_detection.model_config_from_unet(dict(original), "")
    assert type(detected).__name__ == "Flux"
    config = {**detected.unet_config, "dtype": torch.float32}
    theirs = Flux(**config, operations=comfy.ops.disable_weight_init)
    theirs.load_state_dict(detected.process_unet_state_dict(dict(original)))

    x, context = torch.randn(2, 16, 8, 12, generator=generator), torch.randn(2, 5, 48, generator=generator)
    pooled = torch.randn(2, 40, generator=generator)
    time, guidance = torch.tensor([0.3, 0.9]), torch.tensor([3.5, 1.0])
    with torch.no_grad():
        expected = theirs(x, time, context, y=pooled, guidance=guidance)
        got = ours(
            hidden_states=pack(x),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=time,
            guidance=guidance,
            img_ids=image_ids(4, 6, x.device),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
    torch.testing.assert_close(unpack(got, 4), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
