"""What negative prompts inside cross-attention should do, written by hand in float64 and put in the layers' place."""

import math
from contextlib import contextmanager

import torch
from tiny_models import TINY

# scale, tau and blend that leave marks: the growth that tau allows is reached by some tokens and not by others.
SCALES = {"nasa": 0.4, "nag": 3.0, "vsf": 0.7}
TAU, BLEND = 1.6, 0.5
FLOWS = ("wan21", "wan22", "ltxv", "cosmos", "cosmos-predict2", "anima")
FILMS = ("wan21", "wan22", "ltxv", "cosmos", "cosmos-predict2", "anima", "qwen", "hunyuan-video", "hunyuan-video15")


def guidance(method, scale=None, **options):
    from stylewright.training.attention_guidance import AttentionGuidance

    scale = SCALES[method] if scale is None else scale
    return AttentionGuidance(method, **{"scale": scale, "tau": TAU, "blend": BLEND, **options})


def shape_of(family, batch=1):
    tiny = TINY[family]
    film = family in FILMS
    return (batch, tiny.channels, *((1,) if film else ()), *tiny.size)


def draw(model, family, positive, negative=None, cfg=1.0, batch=1, sigmas=None, seed=0):
    """Samples with euler from noise that is the same every time."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive if negative is None else negative)
    guider.set_cfg(cfg)
    top = float(model.get_model_object("model_sampling").sigma_max)
    sigmas = torch.tensor([top, 0.4 * top, 0.0] if sigmas is None else sigmas)
    shape = shape_of(family, batch)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return guider.sample(
            noise, torch.zeros(shape), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )


def by_hand(method, q, positive, negative, heads, scale=None):
    """q (b, n, c), pairs of keys and values (b, m, c): the guided answer in float64."""
    scale = SCALES[method] if scale is None else scale

    def split(x):
        return x.double().reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def scores(k):
        return split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads)

    def joined(x):
        return x.transpose(1, 2).flatten(2)

    z_positive, z_negative = (joined(scores(k).softmax(-1) @ split(v)) for k, v in (positive, negative))
    if method == "nasa":
        return z_positive - scale * z_negative
    if method == "vsf":
        raised = [scores(k).exp() for k, _ in (positive, negative)]
        total = sum(each.sum(-1, keepdim=True) for each in raised)
        return joined(raised[0] / total @ split(positive[1]) - scale * raised[1] / total @ split(negative[1]))
    moved = z_positive + scale * (z_positive - z_negative)
    grown = moved.abs().sum(-1, keepdim=True) / z_positive.abs().sum(-1, keepdim=True)
    return BLEND * moved * grown.clamp_max(TAU) / grown + (1 - BLEND) * z_positive


def linear(layer, x):
    out = x.double() @ layer.weight.double().T
    return out if layer.bias is None else out + layer.bias.double()


@contextmanager
def layers_in_place(modules, forward):
    """Inside, ``forward(module)`` gives the function of each of the modules."""
    try:
        for module in modules:
            module.forward = forward(module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def reference_unet(model, family, positive, negative, method, scale=None, guided=lambda rows: rows, **drawing):
    """``guided(answers)`` picks rows of the batch: by default all of them."""
    text = negative[0][0]
    modules = [each for name, each in model.model.diffusion_model.named_modules() if name.endswith("attn2")]
    assert modules

    def forward(module):
        def attend(x, context=None, value=None, mask=None, transformer_options=None):
            q, against = linear(module.to_q, x), text.expand(x.shape[0], -1, -1)
            pair = [linear(module.to_k, context), linear(module.to_v, context)]
            answer = by_hand(
                method, q, pair, [linear(module.to_k, against), linear(module.to_v, against)], module.heads, scale
            )
            return module.to_out(answer.to(x))

        return attend

    with layers_in_place(modules, forward):
        return draw(model, family, positive, **drawing)
