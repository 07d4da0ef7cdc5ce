"""Which tokens are a model's context, where ComfyUI's text encoders cut off the template that they put around a text.

The encoders' own cutting is run on an answer that says of each token its number: what is left of it is the truth.
"""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.comfy

PROMPT = "a cat beside two dogs in ink style"
# Module of comfy.text_encoders -> classes of its tokenizer and of its encoder.
ENCODERS = {
    "qwen_image": ("QwenImageTokenizer", "QwenImageTEModel"),
    "hunyuan_image": ("HunyuanImageTokenizer", "HunyuanImageTEModel"),
    "kandinsky5": ("Kandinsky5TokenizerImage", "Kandinsky5TEModel"),
    "hunyuan_video": ("HunyuanVideoTokenizer", "HunyuanVideoClipModel"),
    "longcat_image": ("LongCatImageTokenizer", "LongCatImageTEModel"),
    "krea2": ("Krea2Tokenizer", "Krea2TEModel"),
    "mage_flow": ("MageFlowTokenizer", "MageFlowTEModel"),
    "joyimage": ("JoyImageTokenizer", "JoyImageTEModel"),
}


def echo(pairs):
    """The numbers of tokens, as if they were an encoding of one channel, a pooled one and a mask."""
    ids = torch.tensor([[float(token) for token, *_ in pairs[0]]])
    return ids[..., None], None, {"attention_mask": torch.ones_like(ids)}


def llama(text):
    """As HunyuanVideo's tokenizer does, whose files not every copy of ComfyUI has: a token a word."""
    around = [128000, 5, 6, 7, 8, 128006, 882, 128007, 271], [128009, 128006, 78191, 128007]
    words = [1000 + len(word) for word in text.split()]
    ids = {"l": [49406, *words, *[49407] * (76 - len(words))], "llama": [*around[0], *words, *around[1]]}
    return {name: [[(token, 1.0) for token in found]] for name, found in ids.items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_template_is_left_out(name, monkeypatch):
    from comfy import sd1_clip

    from stylewright.nodes.bridge.attended_texts import parts_of

    try:
        module = import_module(f"comfy.text_encoders.{name}")
    except ModuleNotFoundError:
        pytest.skip("this ComfyUI does not have it")
    tokenizer, encoder = (vars(module)[kind] for kind in ENCODERS[name])
    tokenize = llama if name == "hunyuan_video" else tokenizer().tokenize_with_weights
    one, clip = (SimpleNamespace(encode_token_weights=each) for each in (echo, lambda pairs: (None, None)))

    def of_one(self, pairs):
        out, pooled, extra = echo(next(pairs[name] for name in pairs if "qwen" in name))
        return (out[:, None] if name == "krea2" else out), pooled, extra  # of several layers

    def left(pairs):
        if name == "hunyuan_video":
            return encoder.encode_token_weights(SimpleNamespace(llama=one, clip_l=clip), pairs)[0]
        monkeypatch.setattr(sd1_clip.SD1ClipModel, "encode_token_weights", of_one)
        model = encoder.__new__(encoder)
        torch.nn.Module.__init__(model)
        model.byt5_small, model.clip_l = None, clip
        return model.encode_token_weights(pairs)[0]

    for prompt in (PROMPT, "a dog", PROMPT + ', with the words "two dogs" on it'):
        context = left(tokenize(prompt))
        ids, blank = (
            {kind: [token for token, *_ in chunks[0]] for kind, chunks in tokenize(text).items()}
            for text in (prompt, "")
        )
        [part] = parts_of({"cross_attn": context}, ids, blank)
        assert part.of(ids) == context[0, :, 0].int().tolist()
        assert part.size < len(ids[part.encoder])


def test_several_texts_are_behind_each_other():
    from stylewright.nodes.bridge.attended_texts import Part, parts_of

    ids = {"l": [1] * 77, "g": [1] * 77, "t5xxl": [1] * 99, "llama": [1] * 128}
    of = parts_of({"cross_attn": torch.zeros(1, 176, 8)}, ids, ids)
    assert of == [Part("l", 0, 77), Part("t5xxl", 0, 99)]
    answer = {"cross_attn": torch.zeros(1, 99, 8), "conditioning_llama3": torch.zeros(1, 2, 127, 8)}
    last = Part("llama", 1, 127)
    assert parts_of(answer, ids, ids) == [Part("t5xxl", 0, 99), last, last]


def test_an_unknown_context_is_named():
    from stylewright.nodes.bridge.attended_texts import parts_of

    with pytest.raises(ValueError, match=r"which of the 50 tokens .* give a mask"):
        parts_of({"cross_attn": torch.zeros(1, 50, 8)}, {"l": [1, *[5] * 76]}, {"l": [1, *[0] * 76]})
