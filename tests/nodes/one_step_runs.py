"""Drawing with the one-step nodes on tiny models, and what the network was asked while they drew."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULTS = {
    "preset": "custom", "steps": 0, "denoise": 1.0, "levels": "", "unit": "time",
    "between_steps": "as the preset says", "start": "as the preset says",
}  # fmt: skip
REST = {"seed": 3, "cfg": 1.0, "width": 0, "height": 0, "batch_size": 1}


@dataclass
class Call:
    """One evaluation of the network."""

    x: Tensor  # what it was fed
    time: Tensor  # what it was told
    prediction: Tensor  # what it answered


@contextmanager
def calls_of(model):
    """The network's evaluations inside of the block."""
    calls = []

    def record(module, args, kwargs, output):
        x, time = (args + tuple(kwargs.values()))[:2]
        calls.append(Call(x.detach().clone(), time.detach().clone().float(), output.detach().clone().float()))

    handle = model.model.diffusion_model.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def hidden(node):
    """A node as the executor makes it, outside of a server."""

    class Node(node):
        hidden = type("Hidden", (), {"unique_id": None})

    return Node


def one_step(model, positive, latent=None, negative=None, **widgets):
    """The LATENT of the all-in-one node."""
    from stylewright.nodes.one_step import OneStepSampler

    with torch.inference_mode():
        node = hidden(OneStepSampler)
        (drawn,) = node.execute(
            model=model, positive=positive, latent=latent, negative=negative, **{**DEFAULTS, **REST, **widgets}
        ).args
    return drawn


def parts(model, **widgets):
    """SAMPLER, SIGMAS and the text of the parts node."""
    from stylewright.nodes.one_step import OneStepSamplerParts

    with torch.inference_mode():
        return hidden(OneStepSamplerParts).execute(model=model, **{**DEFAULTS, **widgets}).args


def stock(model, positive, samples, sampler, sigmas, seed=3):
    """What ComfyUI's own sampler draws of the same noise."""
    import comfy.sample
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    noise = comfy.sample.prepare_noise(samples, seed)
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    with torch.inference_mode():
        return guider.sample(noise, samples, sampler, sigmas, disable_pbar=True, seed=seed)


def noise_of(samples, seed=3):
    import comfy.sample

    return comfy.sample.prepare_noise(samples, seed)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())
