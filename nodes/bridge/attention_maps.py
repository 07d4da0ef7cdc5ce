"""Where phrases are in a picture by a loaded MODEL: by what it attends to, seen where its blocks call ComfyUI's
attention, or by where it errs more without them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
from torch import Tensor

from ...training.concepts.errors import error_maps
from ...training.concepts.locate import Search, Watch, attention_maps
from ...training.concepts.maps import PATCHES, Recorder
from ...training.concepts.reference import resized, size_to_look_at
from .attended_texts import Tokens
from .denoiser import ComfyDenoiser
from .families import latents_per_token
from .host import comfy_host
from .joint_layouts import layout_of
from .kernels import attentions, exchanged
from .session import training_session

ARGUMENTS = ("heads", "mask", "attn_precision", "skip_reshape")  # after q, k, v in ComfyUI


def phrase_maps(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    picture: Tensor,  # (3, h, w) in [0, 1]
    prompt: str,
    phrases: Sequence[str],
    search: Search,
    resolution: int,  # pixels: the picture is looked at with about resolution² of them
    by: str = "attention",  # or another of LOCATE_BY
) -> Tensor:
    """Maps (phrases, h', w') in [0, 1] of the whole picture. ValueError for a model that cannot be seen into."""
    clone = model.clone()
    host = comfy_host(clone, clip, vae, resolution=resolution)
    size = size_to_look_at(*picture.shape[1:], resolution, host.pixels_per_token)
    bar = comfy.utils.ProgressBar(1)
    asked = (resized(picture, *size), prompt, phrases, search, lambda done, total: bar.update_absolute(done, total))
    if by == "prediction error":
        with training_session(clone):
            return error_maps(host, *asked)

    @contextmanager
    def watched(recorder: Recorder) -> Iterator[None]:
        with training_session(clone), seen(recorder):
            yield

    assert isinstance(host.denoiser, ComfyDenoiser), "comfy_host makes one"
    host = replace(host, token_ids=Tokens(clip, host.denoiser.prompts, prompt))
    watch = Watch(
        watched, layout_of(model.model.diffusion_model), tuple(dict.fromkeys((latents_per_token(model), *PATCHES)))
    )
    return attention_maps(host, watch, *asked)


@contextmanager
def seen(recorder: Recorder) -> Iterator[None]:
    """Inside, a recorder sees every attention of ComfyUI's models, whatever computes it.

    No hook of ComfyUI would do: not all families tell their attention of the transformer options that hold one.
    """
    with ExitStack() as stack:
        for owner, name, attention in attentions():
            stack.enter_context(exchanged(owner, name, wraps(attention)(partial(_see, recorder, attention))))
        yield


def _see(recorder: Recorder, attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    given = {**dict(zip(("q", "k", "v", *ARGUMENTS), args, strict=False)), **kwargs}
    q, k = (
        each if given.get("skip_reshape") else each.flatten(2).unflatten(2, (given["heads"], -1)).transpose(1, 2)
        for each in (given["q"], given["k"])
    )
    recorder.see(q, k, given.get("mask"))
    return attention(*args, **kwargs)
