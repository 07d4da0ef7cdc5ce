"""Gradients through ComfyUI's own modules, loaded as nodes load them: against differences of the loss itself."""

import pytest
import torch

pytestmark = pytest.mark.comfy

FAMILIES = ("sd15", "sdxl", "flux", "sd3", "pixart", "qwen")
SIZES = dict.fromkeys(FAMILIES, (8, 12)) | {"pixart": (36, 40)}


def loss_of(denoiser, x_t, levels, rows, wanted):
    return (denoiser(x_t, levels, rows) - wanted).square().mean()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_differences_of_the_loss(family, checkpoint, tiny, tiny_clip, latent_channels):
    """In-place additions under checkpointing give gradients that are wrong by 26 % and more, without an error."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.gradients import differentiable

    with torch.inference_mode():  # as a loader node does, and the trainer when it encodes
        model, prompts = tiny(family), PromptTable(tiny_clip(family))
        rows = prompts.encode(["a star", "a house by a lake"])
    draw = torch.Generator().manual_seed(5)
    x_t = torch.randn(2, latent_channels[family], *SIZES[family], generator=draw)
    wanted = torch.randn(x_t.shape, generator=draw)
    levels = torch.tensor([-4.0, -1.0])
    with torch.inference_mode(), training_session(model):
        denoiser = ComfyDenoiser(model, prompts)
        config = AdapterConfig(rank=4, targets="style")
        with attached(denoiser.module, config, family=denoiser.family, seed=0) as adapter:
            parameters = adapter.parameters()
            with torch.no_grad():
                for parameter in parameters:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
            with differentiable(denoiser.module, checkpoint=checkpoint):
                loss_of(denoiser, x_t, levels, rows, wanted).backward()
            with torch.no_grad():
                # Nothing hangs on the text stream of Qwen's last block.
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                slope = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
                directions = [gradient / slope for gradient in gradients]
                start = [parameter.clone() for parameter in parameters]

                def loss_at(step):
                    for parameter, value, direction in zip(parameters, start, directions, strict=True):
                        parameter.copy_(value + step * direction)
                    return loss_of(denoiser, x_t, levels, rows, wanted).double()

                h = min(0.1, 1e-3 / float(slope))  # far enough for float32; of fourth order, because the loss bends
                difference = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    torch.testing.assert_close(slope, difference, rtol=5e-3, atol=0)


def test_only_the_adapter_gets_gradients(tiny, tiny_clip):
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.gradients import differentiable

    with torch.inference_mode():
        model, clip = tiny("flux"), tiny_clip("flux")
        assert all(parameter.is_inference() for parameter in model.model.parameters())
    with torch.inference_mode(), training_session(model):
        prompts = PromptTable(clip)
        denoiser = ComfyDenoiser(model, prompts)
        with attached(denoiser.module, AdapterConfig(rank=2), family="flux", seed=0) as adapter:
            with differentiable(denoiser.module):
                rows = prompts.encode(["a", "b"])
                denoiser(torch.randn(2, 16, 8, 12), torch.tensor([-4.0, 0.0]), rows).square().mean().backward()
            ours = {id(parameter) for parameter in adapter.parameters()}
            for parameter in model.model.parameters():
                assert (parameter.grad is not None) == (id(parameter) in ours)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
