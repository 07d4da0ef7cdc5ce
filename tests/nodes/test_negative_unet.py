"""Negative prompts inside the attention of UNets, against a reference in float64 that is written by hand."""

import pytest
import torch

pytestmark = pytest.mark.comfy

METHODS = ("nasa", "nag", "vsf")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_against_float64(family, method, tiny, tiny_prompt):
    from negative_proof import draw, guidance, reference_unet

    from stylewright.nodes.bridge.negative import apply

    model, positive, negative = tiny(family), tiny_prompt(family, 5, 1), tiny_prompt(family, 7, 2)
    base = draw(model, family, positive)
    found = draw(apply(model, negative, guidance(method)), family, positive)
    expected = reference_unet(model, family, positive, negative, method)
    assert (found - expected).norm() < 1e-4 * (expected - base).norm()
    assert torch.equal(draw(model, family, positive), base)
