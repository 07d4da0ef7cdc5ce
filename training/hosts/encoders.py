"""Autoencoders and text encoders: loaded when first needed, on the device only while they work.

A FLUX transformer and its T5 together would fill most cards, and after the pictures and captions have been encoded
training needs neither of the encoders.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_later

from ..denoiser import Conditioning
from .host import TextEncoders
from .parts import Parts

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Autoencoder:
    """A diffusers AutoencoderKL in float32: SDXL's overflows in float16, and bfloat16 costs detail."""

    def __init__(self, parts: Parts) -> None:
        config, kind = parts.config("vae"), parts.listed("vae")
        if kind != ("diffusers", "AutoencoderKL"):
            raise ValueError(f"{parts.folder} has the autoencoder {kind}, expected AutoencoderKL of diffusers")
        self.channels: int = config["latent_channels"]
        self.pixels_per_latent: int = 2 ** (len(config["block_out_channels"]) - 1)
        self.scale: float = config["scaling_factor"]
        self.shift: float = config.get("shift_factor") or 0.0
        self.device = parts.device
        self._load = functools.cache(lambda: parts.load("vae", torch.float32))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (b, c, h', w'): the mean of the posterior, so that one picture always has the same latent."""
        with self._awake() as vae:
            means = [vae.encode(one).latent_dist.mode() for one in (2 * images.to(self.device).float() - 1).split(1)]
        return (torch.cat(means) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in [0, 1]."""
        with self._awake() as vae:
            z = latents.to(self.device).float() / self.scale + self.shift
            images = torch.cat([vae.decode(one, return_dict=False)[0] for one in z.split(1)])
        return (images / 2 + 0.5).clamp(0, 1)

    def open(self) -> Callable[[Tensor], Tensor]:
        """The decoder, to stay on the device: as ``decode``, with gradients, one picture's activations at a time."""
        vae = self._load().to(self.device)
        return partial(decoded, vae, scale=self.scale, shift=self.shift)

    @contextmanager
    def _awake(self) -> "Iterator[AutoencoderKL]":
        vae = self._load()
        with awake([vae], self.device):
            yield vae


def decoded(vae: Any, latents: Tensor, *, scale: float, shift: float) -> Tensor:
    """Pictures (b, 3, h, w) in [0, 1], with gradients. What a picture's decoding keeps is computed again for them."""
    z = latents.float() / scale + shift
    images = [recompute_later(vae.decode, one, return_dict=False, use_reentrant=False)[0] for one in z.split(1)]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


class PromptEncoder:
    """A host's way of reading prompts: a diffusers pipeline, which knows it, of nothing but text encoders.

    ``encode`` asks one kind of pipeline; ``tokens`` says which of its tokenizers make the model's context, and how many
    tokens each fills.
    """

    def __init__(
        self,
        parts: Parts,
        denoiser: nn.Module,
        encode: Callable[[Any, list[str], str], Conditioning],
        tokens: Callable[[Any], dict[str, int]],
    ) -> None:
        self.device = parts.device
        self._tokens = tokens
        self._encode = encode
        self._load = functools.cache(lambda: parts.load_text_pipeline(denoiser))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """One row a prompt. The encoders are on the device only for as long."""
        with awake(self._encoders().values(), self.device):
            return self._encode(self._load(), prompts, self.device)

    def token_ids(self, prompt: str) -> list[list[int]]:
        """The tokens that the model attends to, with padding, by each encoder."""
        pipeline = self._load()
        return [
            [0] * length
            if (tokenizer := getattr(pipeline, name)) is None
            else tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
            for name, length in self._tokens(pipeline).items()
        ]

    def open(self) -> TextEncoders:
        """The CLIPs, to be trained. Other encoders answer each prompt once, and leave the device then."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        modules = {}
        for name, encoder in self._encoders().items():
            if isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
                # Since transformers 5 the model without a projection is its own text transformer.
                inside = dict(encoder.to(self.device).named_children()).get("text_model", encoder)
                modules[f"{name}.text_model."] = inside
            else:
                answer_once(encoder, self.device)
        return TextEncoders(modules, lambda prompts: self._encode(self._load(), prompts, self.device))

    def _encoders(self) -> dict[str, nn.Module]:
        components = self._load().components
        return {name: part for name, part in components.items() if part and name.startswith("text_encoder")}


def answer_once(encoder: nn.Module, device: str) -> None:
    """Has a frozen encoder keep what it answers to tokens (1, n), and rest in main memory otherwise."""
    answers: dict[tuple, Any] = {}
    forward = encoder.forward

    @torch.no_grad()
    def remembering(input_ids: Tensor, **options: Any) -> Any:
        key = (tuple(map(tuple, input_ids.tolist())), *sorted(options.items()))
        if key not in answers:
            with awake([encoder], device):
                answers[key] = forward(input_ids, **options)
        return answers[key]

    encoder.forward = remembering


@contextmanager
def awake(modules: Iterable[nn.Module], device: str) -> Iterator[None]:
    """Modules on the device, and afterwards in main memory again."""
    modules = list(modules)
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to("cpu")
