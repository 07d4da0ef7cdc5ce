"""What a loop needs of a model: the denoiser, and the ways in and out of its latent space."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..clocks import flow_schedule
from ..denoiser import Conditioning, Denoiser
from ..formats.keys import UNET_LAYERS


def _unshifted(steps: int, tokens: int) -> Tensor:
    return flow_schedule(steps)


def _no_decoder() -> Callable[[Tensor], Tensor]:
    raise ValueError("this model brings no decoder that gradients can pass")


@dataclass(frozen=True)
class TextEncoders:
    """CLIPs on the device, to stay there."""

    modules: Mapping[str, nn.Module]  # text transformers, by how their layers' names begin: "text_encoder.text_model."
    encode: Callable[[list[str]], Conditioning]  # one row a prompt, with gradients


@dataclass(frozen=True)
class Features:
    """Of pictures and of texts, whose cosine says how alike they are, as CLIP's. On the device, to stay there."""

    name: str  # tells one kind from another
    pictures: Callable[[Tensor], Tensor]  # (b, 3, h, w) in [0, 1] -> (b, d), with gradients
    texts: Callable[[list[str]], Tensor]  # one row (d,) a prompt


@dataclass(frozen=True)
class Host:
    """A text-to-image model, taken apart. Everything runs on ``device``."""

    name: str  # what the model is called in files and logs, for example "embedded" or a path
    denoiser: Denoiser  # a TimedDenoiser where it is of diffusers
    encode_images: Callable[[Tensor], Tensor]  # (b, 3, h, w) in [0, 1] -> latents (b, c, h', w'), float32
    decode_latents: Callable[[Tensor], Tensor]  # the inverse, clamped to [0, 1]
    encode_prompts: Callable[[list[str]], Conditioning]  # detached, one row a prompt
    pixels_per_latent: int  # for example 8
    pixels_per_token: int  # for example 16: sides of pictures are multiples of this
    resolution: int  # side in pixels that the model was made for
    device: str
    training_conditioning: Conditioning  # extra entries while training, for example FLUX-dev's guidance 1.0
    sampling_conditioning: Conditioning  # the same while sampling, for example guidance 3.5
    latent_channels: int = 16
    schedule: Callable[[int, int], Tensor] = _unshifted  # (steps, image tokens) -> log_snr (steps + 1,) to sample at
    reference_tokens: int | None = None  # laws are stated for so many image tokens, and carried; None = for any
    unet_layers: int = UNET_LAYERS  # residual layers a level of a UNet; nothing to other families
    # CLIPs that an adapter can be on, as they are opened, and those that are inside of the denoiser (see :mod:`.text`).
    open_text_encoders: Callable[[], TextEncoders] | None = None
    text_encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    # Tokens of a prompt, by each encoder whose text the model attends to, in order; None = not known.
    token_ids: Callable[[str], list[list[int]]] | None = None
    guidance_scale: float = 1.0  # of classifier-free guidance, where the model is usually sampled
    told_sizes: bool = False  # whether the denoiser takes the conditioning SIZES
    prompts: tuple[str, ...] = ()  # what it can be asked for, where that is known (see :mod:`..data.prompts`)
    open_features: Callable[[], Features] | None = None  # of the model's own; None = it has none
    # Opens what decodes latents (b, c, h', w') on the device, to stay there: as ``decode_latents``, with gradients.
    open_decoder: Callable[[], Callable[[Tensor], Tensor]] = _no_decoder
