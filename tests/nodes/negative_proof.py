"""What negative prompts inside cross-attention should do, written by hand in float64 and put in the layers' place."""

import math
from contextlib import contextmanager

import torch
from tiny_models import TINY

# scale, tau and blend that leave marks: the growth that tau allows is reached by some tokens and not by others.
SCALES = {"nasa": 0.4, "nag": 3.0, "vsf": 0.7}
TAU, BLEND = 1.6, 0.5
FILMS = ("wan21", "wan22", "ltxv", "cosmos", "cosmos-predict2", "anima", "qwen", "hunyuan-video", "hunyuan-video15")


def guidance(method, scale=None, **options):
    from stylewright.training.attention_guidance import AttentionGuidance

    scale = SCALES[method] if scale is None else scale
    return AttentionGuidance(method, **{"scale": scale, "tau": TAU, "blend": BLEND, **options})


def shape_of(family, batch=1):
    tiny = TINY[family]
    film = family in FILMS
    return (batch, tiny.channels, *((1,) if film else ()), *tiny.size)


def draw(model, family, positive, negative=None, cfg=1.0, batch=1, sigmas=None, seed=0, part=slice(None)):
    """Samples with euler from noise that is the same every time, of the picture or of a ``part`` of its width."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive if negative is None else negative)
    guider.set_cfg(cfg)
    top = float(model.get_model_object("model_sampling").sigma_max)
    sigmas = torch.tensor([top, 0.4 * top, 0.0] if sigmas is None else sigmas)
    shape = shape_of(family, batch)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[..., part]
    with torch.inference_mode():
        return guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )


def sigmas_of(model):
    top = float(model.get_model_object("model_sampling").sigma_max)
    return [top, 0.6 * top, 0.3 * top, 0.0]


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


def per_head(norm, x, heads):
    return norm(x.unflatten(-1, (heads, -1))).flatten(-2)


def of_unet(layer, x, text):
    return layer.to_q(x), layer.to_k(text), layer.to_v(text), layer.heads, layer.to_out


def of_pixart(layer, x, text):
    text = text.reshape(x.shape[0], -1, x.shape[-1])
    return layer.q_linear(x), *layer.kv_linear(text).chunk(2, -1), layer.num_heads, layer.proj


def of_wan(layer, x, text):
    return layer.norm_q(layer.q(x)), layer.norm_k(layer.k(text)), layer.v(text), layer.num_heads, layer.o


def of_cosmos(layer, x, text):
    (q, q_norm), (k, k_norm), (v, v_norm), heads = layer.to_q, layer.to_k, layer.to_v, layer.heads
    made = per_head(q_norm, q(x), heads), per_head(k_norm, k(text), heads), per_head(v_norm, v(text), heads)
    return *(each.transpose(0, 1) for each in made), heads, lambda out: layer.to_out(out.transpose(0, 1))


def of_predict2(layer, x, text):
    q, k = (
        per_head(layer.q_norm, layer.q_proj(x), layer.n_heads),
        per_head(layer.k_norm, layer.k_proj(text), layer.n_heads),
    )
    return q, k, layer.v_proj(text), layer.n_heads, layer.output_proj


def of_ltx(layer, x, text):
    return layer.q_norm(layer.to_q(x)), layer.k_norm(layer.to_k(text)), layer.to_v(text), layer.heads, layer.to_out


# Ends of the layers' names, and what a layer makes of image and text: q, k, v (b, n, c), heads, output projection.
CROSS = {
    "sd15": (".attn2", of_unet), "sd21": (".attn2", of_unet), "sdxl": (".attn2", of_unet),
    "pixart": (".cross_attn", of_pixart), "pixart-alpha": (".cross_attn", of_pixart),
    "wan21": (".cross_attn", of_wan), "wan22": (".cross_attn", of_wan),
    "cosmos": (".attn", of_cosmos), "cosmos-predict2": (".cross_attn", of_predict2),
    "anima": (".cross_attn", of_predict2), "ltxv": (".attn2", of_ltx),
}  # fmt: skip


def layers_of(model, family):
    """The layers that attend to text."""
    end, _ = CROSS[family]
    return [
        each
        for name, each in model.model.diffusion_model.named_modules()
        if name.endswith(end) and not vars(each).get("is_selfattn", False) and "llm_adapter" not in name
    ]


@contextmanager
def in_place(layers, forward):
    """Inside, ``forward(layer, its own forward)`` gives the function of each layer."""
    try:
        for layer in layers:
            layer.forward = forward(layer, layer.forward)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def unmasked(text, mask):
    """Without the tokens that a mask of numbers hides, which are the same for every row."""
    return text if mask is None else text[:, mask[0, 0, 0] == 0]


def texts(model, family, prompt):
    """What each layer is given of a prompt: in one step, for all are given the same."""
    layers, found = layers_of(model, family), {}

    def forward(layer, own):
        def keep(x, context=None, *args, **kwargs):
            found[layer] = unmasked(context, kwargs.get("mask"))
            return own(x, context, *args, **kwargs)

        return keep

    with in_place(layers, forward):
        draw(model, family, prompt, sigmas=[sigmas_of(model)[0], 0.0])
    return found


def reference(model, family, positive, negatives, method, scale=None, acts=lambda number: True, **drawing):
    """Drawn with each layer's attention by hand, of the rows that have the positive prompt's first token.

    ``negatives``: a CONDITIONING, or several with the weight of each.
    """
    if not isinstance(negatives, dict):
        negatives = {1.0: negatives}
    words = texts(model, family, positive)
    layers, make = layers_of(model, family), CROSS[family][1]
    assert layers
    given = [(weight, texts(model, family, each)) for weight, each in negatives.items()]

    def repeated(text, x):
        axis = 1 if family == "cosmos" else 0
        return text.repeat_interleave(x.shape[axis], axis)

    def forward(layer, own):
        number = layers.index(layer)

        def attend(x, context=None, *args, **kwargs):
            if not acts(number):
                return own(x, context, *args, **kwargs)
            answers, plain = 0, 0
            for weight, found in given:
                q, k, v, heads, out = make(layer, x, unmasked(context, kwargs.get("mask")))
                _, against_k, against_v, _, _ = make(layer, x, repeated(found[layer], x))
                plain = by_hand("nasa", q, (k, v), (against_k, against_v), heads, 0.0)
                answers = answers + weight * by_hand(method, q, (k, v), (against_k, against_v), heads, scale)
            _, first, _, _, _ = make(layer, x, repeated(words[layer], x))
            guided = [torch.allclose(k[row, 0], first[row, 0], atol=1e-5) for row in range(len(q))]
            return out(torch.where(torch.tensor(guided)[:, None, None], answers, plain).to(x))

        return attend

    with in_place(layers, forward):
        return draw(model, family, positive, **drawing)
