"""Opening models from disk, and what is said when one cannot be opened."""

import pytest
import torch

from stylewright.training.hosts.loading import load_host


def assert_same_weights(module, expected):
    ours, theirs = module.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "sd15", "pixart"])
def test_a_single_file_holds_the_same_model_as_its_folder(tiny_folder, tiny_file, family):
    folder = load_host(tiny_folder(family))
    file = load_host(tiny_file(family), components=tiny_folder(family))
    assert_same_weights(file.denoiser.module, folder.denoiser.module)
    prompts, images = ["a cat", "two dogs in a boat"], torch.rand(2, 3, 16, 24)
    for name, value in folder.encode_prompts(prompts).items():
        assert torch.equal(file.encode_prompts(prompts)[name], value)
    assert torch.equal(file.encode_images(images), folder.encode_images(images))
