"""What a user hands over encoded: latents and conditioning in the place of pictures and captions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_patcher
import comfy.sd
from torch import Tensor

from ...training.data.cache import settle
from ...training.data.concepts import Concept
from ...training.data.items import Encoded, Item
from ...training.loops.config import TrainConfig
from .conditioning import encoded_captions
from .families import latent_format
from .host import into_model, pixels_per_latent


def given_items(
    latents: Sequence[Mapping[str, Any]], conditionings: Sequence[list]
) -> tuple[list[Item], Mapping[str, dict[str, Any]]]:
    """Items of LATENTs (batches of any sizes) and CONDITIONINGs, and what their captions stand for.

    One conditioning is for all latents, or there are as many as latents. A noise_mask is where to learn. Latents stay
    as the sockets give them: :func:`for_model` takes them into a model's space. ValueError for what does not fit.
    """
    pictures = [picture for latent in latents for picture in _pictures(latent)]
    if not pictures:
        raise ValueError("there are no latents: link some, or a dataset")
    encoded = encoded_captions(conditionings)
    captions = encoded.captions * len(pictures) if len(encoded.captions) == 1 else encoded.captions
    if len(captions) != len(pictures):
        raise ValueError(
            f"got {len(pictures)} latents and {len(captions)} conditionings: expected one for all, or one a latent"
        )
    concept = Concept(style_phrase="", caption_mode="plain")
    items = [
        Item(Encoded(latent), caption, mask, concept=concept, name=f"latent {number}")
        for number, ((latent, mask), caption) in enumerate(zip(pictures, captions, strict=True), start=1)
    ]
    return items, encoded.answers


def _pictures(latent: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The latents (c, h, w) of a batch, with their masks (h, w)."""
    samples = latent["samples"]
    if not isinstance(samples, Tensor) or samples.ndim not in (4, 5):
        shape = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"latents of shape {shape} are no pictures: expected (batch, channels, height, width)")
    if samples.ndim == 5:
        if samples.shape[2] != 1:
            raise ValueError(f"the latents are films of {samples.shape[2]} frames: training takes single pictures")
        samples = samples[:, :, 0]
    masks = _masks(latent.get("noise_mask"), len(samples))
    for picture, mask in zip(samples, masks, strict=True):
        yield settle(picture.float()), mask


def _masks(masks: Tensor | None, count: int) -> list[Tensor | None]:
    """One mask (h, w) a latent; a single one is for all."""
    if masks is None:
        return [None] * count
    flat = settle(masks.float()).reshape(-1, *masks.shape[-2:])
    if len(flat) not in (1, count):
        raise ValueError(f"got {count} latents and {len(flat)} noise masks: expected one for all, or one a latent")
    return list(flat.expand(count, -1, -1))


def side_of(items: Sequence[Item], model: comfy.model_patcher.ModelPatcher) -> int:
    """Side in pixels of a square as large as the first latent's picture."""
    encoded = items[0].image
    assert isinstance(encoded, Encoded), "these items are latents"
    return round(math.sqrt(encoded.latent[0].numel()) * pixels_per_latent(model))


def for_model(items: Sequence[Item], model: comfy.model_patcher.ModelPatcher) -> list[Item]:
    """The items with their latents as the model sees them: scaled and shifted by its format.

    ValueError for latents of another model's.
    """
    return [
        replace(item, image=Encoded(_for_model(item.name, item.image.latent, model)))
        if isinstance(item.image, Encoded)
        else item
        for item in items
    ]


def _for_model(name: str, latent: Tensor, model: comfy.model_patcher.ModelPatcher) -> Tensor:
    expected = latent_format(model).latent_channels
    if len(latent) != expected:
        raise ValueError(
            f"{name} has {len(latent)} channels, and the model works on {expected}: encode the pictures with the VAE "
            "that belongs to the model"
        )
    return into_model(latent[None], model)[0]


def require_sockets(
    clip: comfy.sd.CLIP | None,
    vae: comfy.sd.VAE | None,
    items: Sequence[Item],
    answers: Mapping[str, dict[str, Any]],
    config: TrainConfig,
) -> None:
    """ValueError where a CLIP or a VAE is missing, with what it is needed for, or where a CLIP would learn nothing."""
    rate = config.text_encoder_learning_rate
    if rate and answers:
        raise ValueError(
            f"text_encoder_learning_rate is {rate:g}, and captions that you encoded teach no "
            "text encoder: set it to 0, or give the captions as text and link the model's CLIP to 'clip'"
        )
    samples = bool(config.sample_every and config.sample_prompts)
    texts = any(item.caption not in answers for item in items)
    pictures = any(not isinstance(item.image, Encoded) for item in items)
    to_draw = (samples, "to draw sample pictures (or set sample_every to 0)")
    of_clip = [
        (texts, "to encode the captions"),
        (config.caption_dropout > 0, "for caption_dropout"),
        (rate > 0, "to be trained (text_encoder_learning_rate)"),
        to_draw,
    ]
    of_vae = [(pictures, "to encode the pictures"), to_draw]
    for name, socket, needs in (("clip", clip, of_clip), ("vae", vae, of_vae)):
        reasons = [reason for needed, reason in needs if needed]
        if socket is None and reasons:
            raise ValueError(f"link the model's {name.upper()} to '{name}': it is needed {' and '.join(reasons)}")
