"""The arithmetic that a run gets where its user leaves it open."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    ("device", "asked", "got"),
    [
        ("cuda", "automatic", "bfloat16"),
        ("cpu", "automatic", "float32"),
        ("mps", "automatic", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
        ("cuda", "float32", "float32"),
    ],
)
def test_the_device_decides_what_the_user_leaves_open(device, asked, got):
    from stylewright.nodes.bridge.precision import precision_for

    assert precision_for(SimpleNamespace(load_device=torch.device(device)), asked) == got
