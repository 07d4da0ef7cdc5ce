"""Which attention of which model is of which place to which word: planted in every family, and found there.

Where a place and a word are in a model's sequences is found out by changing them: the queries that move most with a
patch of the picture are that place's, and the keys that move most with a token of the text are that word's. There
queries and keys are then set to meet, and nothing but the place of the map and the name of the phrase is asked for.
"""

import re
from functools import lru_cache, partial

import pytest
import torch
from tiny_models import TINY, TinyClip, TinyVae, is_known, tiny_conditioning, tiny_model

pytestmark = pytest.mark.comfy

PROMPT, PHRASES = "a cat beside two dogs in ink style", ["a cat", "two dogs"]
WORD = PROMPT.split().index("dogs")
PLACE = (2, 1)  # row and column of tokens
# Of each encoder the number of tokens, and which of them is the first word's.
ENCODERS = {
    "sd3": {"l": (20, 1), "g": (20, 1), "t5xxl": (30, 1)},
    "flux": {"l": (20, 1), "t5xxl": (30, 1)},
    "hidream": {"l": (20, 1), "g": (20, 1), "t5xxl": (12, 1), "llama": (15, 3)},
    "hunyuan-dit": {"hydit_clip": (77, 1), "mt5xl": (8, 1)},
    "hidream-o1": {"hidream_o1": (22, 1)},
    "anima": {"qwen3_06b": (20, 3), "t5xxl": (14, 1)},
}


class Words(TinyClip):
    """A token a word, between what encoders add. ``moved`` is the word of which something else is said."""

    moved = None

    @property
    def encoders(self):
        family = {"sd35-medium": "sd3", "hunyuan-dit1": "hunyuan-dit"}.get(self.family, self.family)
        return ENCODERS.get(family, {"encoder": (20, 1)})

    def tokenize(self, text):
        words = [2 + sum(word.encode()) for word in text.split()]
        return {
            name: [[(token, 1.0) for token in ([1] * first + words + [0] * length)[:length]]]
            for name, (length, first) in self.encoders.items()
        }

    def encode_from_tokens_scheduled(self, tokens, show_pbar=True):
        ids = {name: [token for token, _ in chunks[0]] for name, chunks in tokens.items()}
        count = {"sd3": 50, "sd35-medium": 50, "flux": 30, "hidream": 12}.get(self.family, 20)
        [[context, extra]] = tiny_conditioning(self.family, count, 1)
        at = {"sd3": 20, "sd35-medium": 20}.get(self.family, 0) + 1 + (self.moved or 0)  # T5's
        if self.family == "anima":
            extra |= {"t5xxl_ids": torch.tensor(ids["t5xxl"]) % 32, "t5xxl_weights": torch.ones(len(ids["t5xxl"]))}
            extra["t5xxl_ids"][at] += self.moved is not None
        if self.family == "hidream":
            extra["conditioning_llama3"] = extra["conditioning_llama3"].repeat(1, 1, 2, 1)[:, :, :14]
        if self.family == "hidream-o1":
            extra["text_input_ids"][0, at] = (extra["text_input_ids"][0, at] + (self.moved is not None)) % 64
        if self.moved is not None:
            context[:, at] += 10 * torch.randn(context.shape[-1], generator=torch.Generator().manual_seed(5))
        return [[context, extra]]


@lru_cache(1)
def model_of(family):
    with torch.inference_mode():
        return tiny_model(family)


@pytest.fixture(scope="module", autouse=True)
def models_go():
    yield
    model_of.cache_clear()


def picture_of(family, moved):
    """About 6 x 8 tokens, of which one is changed."""
    from stylewright.nodes.bridge.families import latents_per_token

    side = latents_per_token(model_of(family)) * TINY[family].pixels
    rows, columns = (18, 18) if family.startswith("pixart") else (6, 8)
    picture = torch.rand(3, rows * side, columns * side, generator=torch.Generator().manual_seed(0))
    y, x = (side * each for each in PLACE)
    if moved:
        picture[:, y : y + side, x : x + side] = 1 - picture[:, y : y + side, x : x + side]
    return picture


def looked(family, see, word=None, place=False):
    from stylewright.nodes.bridge.attention_maps import phrase_maps
    from stylewright.nodes.bridge.families import is_film
    from stylewright.training.concepts.locate import Search
    from stylewright.training.concepts.maps import Recorder

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "see", see)
        model, clip, picture = model_of(family), Words(family), picture_of(family, place)
        clip.moved = word
        vae = TinyVae(family, is_film(model))
        resolution = round((picture.shape[1] * picture.shape[2]) ** 0.5)
        return phrase_maps(model, clip, vae, picture, PROMPT, PHRASES, Search((0.0,), 1), resolution)


def attentions(family, **moved):
    from stylewright.training.concepts.maps import Recorder

    seen, see = [], Recorder.see

    def kept(recorder, q, k, mask=None):
        seen.append((q.clone(), k.clone()))
        see(recorder, q, k, mask)

    looked(family, kept, **moved)
    return seen


def rows_of(which, before, after, beside=None):
    """Of each attention the row that moves most, and not as much ``beside``: what a pooled text moves.

    It is that of the first one of its shape: later ones have mixed the rows.
    """
    first = {}
    for one, other, third in zip(before, after, beside or before, strict=True):
        moved, aside = ((each[which] - one[which]).float().square().sum((0, 1, 3)) for each in (other, third))
        first.setdefault(tuple(each.shape[2] for each in one), int((moved - aside).argmax()))
    return [first[tuple(each.shape[2] for each in one)] for one in before]


# UNets are in test_concept_crops.py. PixelDiT's encoder leaves out tokens in the middle.
TRANSFORMERS = [family for family, tiny in TINY.items() if "channel_mult" not in tiny.config and family != "pixeldit"]


@pytest.fixture(params=TRANSFORMERS)
def family(request):
    if not is_known(request.param):
        pytest.skip("this ComfyUI does not have it")
    return request.param


def test_what_is_planted_is_found(family):
    from stylewright.training.concepts.maps import Recorder

    see, usual = Recorder.see, attentions(family)
    queries = rows_of(0, usual, attentions(family, place=True))
    keys = rows_of(1, usual, attentions(family, word=WORD), attentions(family, word=WORD - 1))
    numbers = iter(range(len(usual)))

    def planted(recorder, q, k, mask=None):
        number, q, k = next(numbers), q.clone(), k.clone()
        q[:, :, queries[number]], k[:, :, keys[number]] = 1.0, 1.0
        see(recorder, q, k, mask)

    maps = looked(family, planted)
    found = maps[1].flatten().argmax()
    side = maps.shape[2] / (18 if family.startswith("pixart") else 8)
    assert (int(found // maps.shape[2] / side), int(found % maps.shape[2] / side)) == PLACE
    assert maps[1].max() > 0.5 > maps[0].flatten()[found]


# Layers whose answers are the queries of places and the keys of words, with the rows of PLACE and WORD in them.
AT = WORD + 1  # behind the encoder's first token
ROW = 8 * PLACE[0] + PLACE[1]
LAYERS = {
    "pixart": {r"cross_attn\.q_linear": 18 * PLACE[0] + PLACE[1], r"cross_attn\.kv_linear": AT},
    "wan21": {r"cross_attn\.norm_q": ROW, r"cross_attn\.norm_k": AT},
    "lumina2": {r"^layers.*q_norm": 20 + ROW, r"^layers.*k_norm": AT},
    "hidream": {
        r"\.q_rms_norm$": ROW, r"double.*\.k_rms_norm_t": AT, r"single.*\.k_rms_norm$": 48 + AT,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", LAYERS)
def test_the_model_s_own_layers_are_seen(family):
    """The same, planted in the answers of layers: what the blocks attend to is what is recorded."""
    from stylewright.training.concepts.maps import Recorder

    found, hooks = {}, []
    for name, layer in model_of(family).model.diffusion_model.named_modules():
        for pattern, row in LAYERS[family].items():
            if re.search(pattern, name):
                found.setdefault(pattern, []).append(name)
                hooks.append(layer.register_forward_hook(partial(_meet, row)))
    try:
        maps = looked(family, Recorder.see)
    finally:
        for hook in hooks:
            hook.remove()
    assert found.keys() == LAYERS[family].keys()
    place = maps[1].flatten().argmax()
    side = maps.shape[2] / (18 if family == "pixart" else 8)
    assert (int(place // maps.shape[2] / side), int(place % maps.shape[2] / side)) == PLACE
    assert maps[1].max() > 0.5 > maps[0].flatten()[place]


def _meet(row, layer, inputs, answer):
    answer = answer.clone()
    answer[:, row] = 3.0
    return answer
