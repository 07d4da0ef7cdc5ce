"""How families attend to their text: apart from the picture, or both in one sequence, and then where each begins."""

from collections.abc import Callable
from math import ceil
from typing import Any

from ...training.concepts.maps import Joint, picture_first, text_first

LEAST_OF_FLUX2 = 512  # tokens


def padded(network: Any) -> Joint:
    """Lumina 2 and Z-Image, which pads its text and its picture to multiples of tokens."""
    multiple = getattr(network, "pad_tokens_multiple", None) or 1

    def begins(length: int, text: int, picture: int) -> tuple[int, int] | None:
        text, picture = (ceil(count / multiple) * multiple for count in (text, picture))
        return text_first(length, text, picture)

    return begins


def padded_in_front(length: int, text: int, picture: int) -> tuple[int, int] | None:
    """FLUX.2, which puts zeros in front of a text that is shorter than 512 tokens; FLUX.1 has its text as it is."""
    begin = length - picture - text
    return (begin, begin + text) if begin == 0 or 0 < begin == LEAST_OF_FLUX2 - text else None


def with_registers(network: Any) -> Joint:
    """AuraFlow, which has learned tokens in front of its text."""
    registers = network.register_tokens.shape[1]

    def begins(length: int, text: int, picture: int) -> tuple[int, int] | None:
        return (registers, registers + text) if length == registers + text + picture else None

    return begins


def with_glyphs(network: Any) -> Joint:
    """HunyuanVideo and HunyuanImage, with tokens of letters to be drawn: before the text in 1.5, else behind it."""
    first = getattr(network, "cond_type_embedding", None) is not None

    def begins(length: int, text: int, picture: int) -> tuple[int, int] | None:
        glyphs = length - text - picture
        return None if glyphs < 0 else (glyphs if first else 0, text + glyphs)

    return begins


def without_padding(length: int, text: int, picture: int) -> tuple[int, int] | None:
    """Mochi, which has the picture first and leaves the padding of its text out."""
    return (picture, 0) if picture < length <= picture + text else None


CROSS = (
    "UNetModel", "PixArtMS", "WanModel", "GeneralDIT", "MiniTrainDIT", "LTXVModel", "HunYuanDiT", "Kandinsky5",
)  # fmt: skip
TEXT_FIRST = (
    "Chroma", "OpenAISignatureMMDITWrapper", "QwenImageTransformer2DModel", "OmniGen2Transformer2DModel",
    "BooguTransformer2DModel", "SingleStreamDiT", "Ideogram4Transformer2DModel", "MageFlowTransformer2DModel",
    "CogVideoXTransformer3DModel", "HiDreamO1Transformer",
)  # fmt: skip
PICTURE_FIRST = (
    "HiDreamImageTransformer2DModel", "ErnieImageModel", "LensTransformer2DModel", "JoyImageTransformer3DModel",
)  # fmt: skip

# Class of a diffusion model -> of the model, where text and picture begin in one sequence. A class counts for what
# derives from it.
LAYOUTS: dict[str, Callable[[Any], Joint]] = {
    **dict.fromkeys((*CROSS, *TEXT_FIRST), lambda network: text_first),
    **dict.fromkeys(PICTURE_FIRST, lambda network: picture_first),
    "Flux": lambda network: padded_in_front,
    "AsymmDiTJoint": lambda network: without_padding,
    "NextDiT": padded,
    "MMDiT": with_registers,
    "HunyuanVideo": with_glyphs,
}


def layout_of(network: Any) -> Joint:
    """ValueError for a class that is not known."""
    kinds = [kind.__name__ for kind in type(network).__mro__]
    known = next((kind for kind in kinds if kind in LAYOUTS), None)
    if known is None:
        raise ValueError(
            f"{kinds[0]}: where this model's attention has the text is not known. It works on {', '.join(LAYOUTS)}; "
            "locate by prediction error instead, or give a mask of each phrase"
        )
    return LAYOUTS[known](network)
