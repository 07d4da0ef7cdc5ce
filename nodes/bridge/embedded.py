"""The embedded model as ComfyUI's own MODEL, CLIP and VAE, opened by ComfyUI's own loaders."""

import logging
from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ...training.embedded.renderer import SIZE
from ...training.embedded.text import TextEncoder
from ...training.embedded.vocabulary import PAD, SLOTS, WORDS, explain_unknown, tokenize
from ...training.embedded.weights import Weights
from ...training.noise import PUBLISHED_TOKENS
from .adapters import Strengths, apply_adapter, read_tensors
from .families import REFERENCE_TOKENS, SIDE

logger = logging.getLogger(__name__)

KEY = "stylewright"  # under which our tokens travel from the tokenizer to the text encoder
Tokens = dict[str, list[list[tuple[int, float]]]]


@dataclass(frozen=True)
class EmbeddedModel:
    """The three parts of a text-to-image model, as ComfyUI's sockets carry them."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE


def load_embedded(weights: Weights | None = None, *, one_step: bool = False) -> EmbeddedModel:
    """The shipped weights, or others of the same shapes; with ``one_step`` the student is on the model.

    FileNotFoundError names a file that is missing.
    """
    weights = weights or Weights()
    for path in (weights.transformer, weights.text_encoder, weights.autoencoder, *([weights.student] * one_step)):
        if not path.is_file():
            raise FileNotFoundError(
                f"the embedded model is incomplete: {path} is missing. Install the pack again, or rebuild the "
                "weights with `stylewright embedded`"
            )
    model = comfy.sd.load_diffusion_model(str(weights.transformer))
    model.set_attachments(REFERENCE_TOKENS, PUBLISHED_TOKENS)
    model.set_attachments(SIDE, SIZE)
    if one_step:
        model = apply_adapter(model, None, read_tensors(weights.student), Strengths(), warn=logger.warning).model
    return EmbeddedModel(
        model=model,
        clip=load_text_encoder(weights),
        vae=load_autoencoder(weights),
    )


def load_autoencoder(weights: Weights) -> comfy.sd.VAE:
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(weights.autoencoder)))
    vae.throw_exception_if_invalid()
    return vae


def load_text_encoder(weights: Weights) -> comfy.sd.CLIP:
    """A CLIP that stock nodes take: CLIPTextEncode, LoRA loaders, CLIPSetLastLayer."""
    clip = comfy.sd.CLIP(target=Target())
    clip.load_sd(comfy.utils.load_torch_file(str(weights.text_encoder)))
    return clip


class EmbeddedTokenizer:
    """Words to indices, in the shape that ComfyUI passes on."""

    def __init__(self, embedding_directory: object = None, tokenizer_data: object = None) -> None:
        pass  # textual inversions and tokenizer files do not exist here

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, tokenizer_options: dict | None = None
    ) -> Tokens:
        """ValueError for words outside the vocabulary, which it lists."""
        tokens = tokenize(text)
        if tokens.unknown:
            raise ValueError(explain_unknown(sorted(set(tokens.unknown))))
        return {KEY: [[(index, 1.0) for index in tokens.indices]]}

    def untokenize(self, tokens: list[tuple[int, float]]) -> list[tuple[tuple[int, float], str]]:
        return [(token, WORDS[token[0]]) for token in tokens]

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class EmbeddedTextModel(nn.Module):
    """The embedded text encoder behind the methods that ``comfy.sd.CLIP`` calls."""

    def __init__(self, device: object = None, dtype: object = None, model_options: object = None) -> None:
        super().__init__()
        # 60 kB in float32: neither placed nor rounded by what ComfyUI suggests.
        self.encoder = TextEncoder()
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        """There are no layers to stop at, and no projection to leave out."""

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Context (1, 8, 128) and pooled vector (1, 128)."""
        indices = [[index for index, _ in row] for row in tokens[KEY]] or [[PAD] * SLOTS]
        context, pooled = self.encoder(torch.tensor(indices, device=self.encoder.words.weight.device))
        return context.cpu(), pooled.cpu()

    def load_sd(self, state: dict[str, Tensor]) -> object:
        return self.encoder.load_state_dict({key: value.float() for key, value in state.items()})


@dataclass(frozen=True)
class Target:
    """What ``comfy.sd.CLIP`` builds itself from."""

    clip: type = EmbeddedTextModel
    tokenizer: type = EmbeddedTokenizer
    params: dict = field(default_factory=dict)
