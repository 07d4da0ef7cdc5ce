"""The CLIPs behind a CLIP socket: what of them can be trained, and how they stay on the device while they are."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import torch
from torch import nn

# ComfyUI's name -> diffusers' and ours. kohya's tools and ComfyUI count the same way, lora_te1_ and lora_te2_.
NAMES = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}


def trainable_text_encoders(clip: comfy.sd.CLIP) -> dict[str, nn.Module]:
    """Text transformers by how the names of their layers begin. ValueError, with the reason, where there is none."""
    found = {name: part for name, part in clip.cond_stage_model.named_children() if _is_clip(part) and name in NAMES}
    if not found:
        others = ", ".join(name for name, _ in clip.cond_stage_model.named_children())
        raise ValueError(
            f"the text encoder of this model ({others or type(clip.cond_stage_model).__name__}) is no CLIP, and no "
            "other kind can be trained: set text_encoder_learning_rate to 0"
        )
    # A clip_g by itself is the first text encoder, for ComfyUI too.
    names = NAMES if len(found) > 1 else dict.fromkeys(found, "text_encoder")
    return {f"{names[name]}.text_model.": part.transformer.text_model for name, part in found.items()}


def has_clip(clip: comfy.sd.CLIP) -> bool:
    """Whether :func:`trainable_text_encoders` has any."""
    return any(_is_clip(part) and name in NAMES for name, part in clip.cond_stage_model.named_children())


def describe(clip: comfy.sd.CLIP) -> str:
    """Which text encoders are trained, for people."""
    return " and ".join(name for name, part in clip.cond_stage_model.named_children() if _is_clip(part))


def _is_clip(part: nn.Module) -> bool:
    is_encoder = isinstance(part, comfy.sd1_clip.SDClipModel)
    return is_encoder and isinstance(part.transformer, comfy.clip_model.CLIPTextModel)


def activation_bytes(clip: comfy.sd.CLIP, checkpoint: bool) -> int:
    """What a prompt's gradients need of memory: 34 numbers a token, channel and layer (arXiv 2205.05198, Eq. 1)."""
    total = 0
    for part in clip.cond_stage_model.children():
        if _is_clip(part):
            positions, width = part.transformer.text_model.embeddings.position_embedding.weight.shape
            layers = part.num_layers
            total += 4 * positions * width * (layers + 34 if checkpoint else 34 * layers)
    return total


def resident(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """The same CLIP, which counts as loaded: asked for an answer, ComfyUI would else make room for it each time, and
    could push the model that is being trained off the device.
    """
    clone = clip.clone()
    clone.load_model = lambda tokens=None: clone.patcher
    return clone


@contextmanager
def others_answer_once(clip: comfy.sd.CLIP) -> Iterator[None]:
    """Inside, text encoders beside the CLIPs (T5) keep what they answer to a prompt: nothing of it is trained."""
    with ExitStack() as stack:
        for part in clip.cond_stage_model.children():
            if isinstance(part, comfy.sd1_clip.SDClipModel) and not _is_clip(part):
                part.encode_token_weights = _remembering(part.encode_token_weights)
                stack.callback(vars(part).pop, "encode_token_weights")
        yield


def _remembering(encode: Callable[[list], Any]) -> Callable[[list], Any]:
    answers: dict[str, Any] = {}

    @torch.no_grad()
    def remembering(tokens: list) -> Any:
        if not all(isinstance(token, int) for section in tokens for token, *_ in section):
            return encode(tokens)  # embeddings from a file, of which there is no short name
        key = repr(tokens)
        if key not in answers:
            answers[key] = encode(tokens)
        return answers[key]

    return remembering
