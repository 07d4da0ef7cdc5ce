"""Maps of phrases by models of diffusers: their own attention, at the tokens of the phrase."""

import math
import warnings

import pytest
import torch

from stylewright.training.concepts.locate import Search, attention_maps
from stylewright.training.concepts.maps import Recorder
from stylewright.training.concepts.phrases import places_of
from stylewright.training.hosts.attention_maps import watch_of
from stylewright.training.hosts.embedded import load_embedded
from stylewright.training.hosts.loading import load_host

FAMILIES = ["embedded", "flux", "sd3", "sdxl", "sd15", "pixart"]
PROMPTS = {"embedded": ("star and house in <v0> style", "house")}
ORDINARY = ("a cat and a dog in ink style", "a dog")


@pytest.fixture(params=FAMILIES)
def host(request, tiny_folder):
    if request.param == "embedded":
        return load_embedded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_host(tiny_folder(request.param))


def prompt_of(host):
    return PROMPTS.get(host.name, ORDINARY)


def picture_of(host):
    side = 4 * host.pixels_per_token
    return torch.rand(3, side, 2 * side, generator=torch.Generator().manual_seed(0))


def text_keys(host, seen):
    """Hooks on the layers that make keys of the text, whose outputs (b, n, heads * d) go to ``seen``."""
    named = host.denoiser.module.named_modules()
    layers = [layer for name, layer in named if name.endswith(("add_k_proj", "attn2.to_k"))]
    if host.denoiser.family == "sd3":  # its attn2 is another attention of the picture to itself
        layers = [layer for name, layer in host.denoiser.module.named_modules() if name.endswith("add_k_proj")]
    norms = {
        module.add_k_proj: module.norm_added_k
        for module in host.denoiser.module.modules()
        if getattr(module, "norm_added_k", None) is not None
    }

    def keep(layer, _, output):
        norm = norms.get(layer)
        if norm is not None:
            output = norm(output.unflatten(-1, (-1, norm.weight.shape[0]))).flatten(2)
        seen.append(output)

    return [layer.register_forward_hook(keep) for layer in layers]


def test_the_keys_are_the_texts_and_the_places_the_phrases(host, monkeypatch):
    prompt, phrase = prompt_of(host)
    made, used = [], []
    original = Recorder.see

    def see(self, q, k, mask=None):
        parts = self._parts(q.shape[2], k.shape[2])
        if parts is not None:
            used.append(k[:, :, parts[1]].transpose(1, 2).flatten(2))
        original(self, q, k, mask)

    monkeypatch.setattr(Recorder, "see", see)
    handles = text_keys(host, made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = attention_maps(
            host, watch_of(host), picture_of(host), prompt, [phrase, prompt.partition(" and")[0]], Search(noises=1)
        )
    for handle in handles:
        handle.remove()
    height, width = (side // host.pixels_per_latent for side in picture_of(host).shape[1:])
    assert maps.shape == (2, height, width) and maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    assert made and len(used) >= len(made)
    for key in made:  # of FLUX's single blocks keys of the text come from the same layer as the picture's
        assert any(key.shape == other.shape and torch.allclose(key, other, atol=1e-5) for other in used)


def test_places_are_of_the_tokens_of_the_words(host):
    prompt, phrase = prompt_of(host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts = host.token_ids(prompt)
        assert sum(map(len, texts)) == host.encode_prompts([prompt])["context"].shape[1]
        places = places_of(host.token_ids, prompt, phrase)
        alone = [host.token_ids(phrase)[number] for number in range(len(texts))]
    flat = [token for text in texts for token in text]
    found = [flat[place] for place in places]
    inside = [token for text in alone for token in text]
    assert math.prod(token in inside for token in found) and len(found) >= 1
    assert all(place < len(flat) for place in places)
