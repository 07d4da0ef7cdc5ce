"""From items to a dataset: every picture and caption through the model's encoders, once."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Conditioning
from ..hosts.host import Host
from ..randomness import generator
from .buckets import Bucket, enlargement, kept, make_buckets, nearest
from .cache import Cache, digest, digest_named, settled
from .captions import Caption, complete, listed
from .dataset import Dataset, Example
from .images import Picture, fit, load_picture
from .items import Item

log = logging.getLogger(__name__)

PROBE_TOKENS = 4  # side of the picture that tells one image encoder from another
CUT_WORTH_A_WARNING = 0.75  # share of a picture that is left

Counter = Callable[[], None]


@dataclass(frozen=True)
class View:
    """How a picture is going to be seen."""

    bucket: Bucket
    key: str  # hash of its pixels at the bucket's size
    mask: Tensor | None  # (1, h, w) of the latent


def encode(
    items: Sequence[Item],
    host: Host,
    *,
    resolution: int,  # pixels: pictures are trained at about resolution² of them
    style_phrase: str,  # "" = none, with complete captions
    caption_mode: str = "content",  # "content" = put into the template; "full" = complete, has to contain the phrase
    caption_dropout: float = 0.0,  # share of draws that see the empty prompt instead
    cache_dir: Path | None = None,  # None = kept in memory only
    progress: Callable[[int, int], None] | None = None,  # pieces done, pieces in all
) -> Dataset:
    """The dataset of ``items`` for ``host``.

    All captions and pictures are checked before the first is encoded. Each is encoded alone, so that it does not
    depend on its neighbours: the same bits with the cache and without. ValueError names what is wrong and the
    picture it is wrong with; TrainingError where the cache cannot be written.
    """
    if not items:
        raise ValueError("There are no pictures to train on: give at least one")
    if not 0 <= caption_dropout <= 1:
        raise ValueError(f"The caption dropout is {caption_dropout}, expected a share from 0 to 1")
    captions = complete([_caption(item, style_phrase) for item in items], caption_mode)
    views = survey(items, host, resolution)
    cache = Cache(cache_dir)
    done = _counter(progress, len(set(captions)) + len(items))
    null = settled(encode_prompt(host, ""))
    rows = _encode_captions(captions, host, cache, null, done)
    latents = _encode_views(items, views, host, cache, done)
    examples = [
        Example(item.name, latent, rows[caption], view.mask, caption, item.repeats)
        for item, caption, view, latent in zip(items, captions, views, latents, strict=True)
    ]
    return Dataset(examples, null, caption_dropout)


def _caption(item: Item, style_phrase: str) -> Caption:
    return Caption(item.name, item.caption, style_phrase if item.style_phrase is None else item.style_phrase)


def survey(items: Sequence[Item], host: Host, resolution: int) -> list[View]:
    """Opens every picture once and decides its size. ValueError with everything that cannot be used."""
    buckets = make_buckets(resolution, host.pixels_per_token)
    views, problems, enlarged, cut = [], [], [], []
    for item in items:
        try:
            picture = load_picture(item.image, item.mask, item.name)
            view = _view(item, picture, buckets, host)
        except ValueError as error:
            problems.append(str(error))
            continue
        views.append(view)
        height, width = picture.pixels.shape[1:]
        change = f"{item.name} ({width}x{height} to {view.bucket})"
        enlarged += [change] if enlargement(view.bucket, height, width) > 1 else []
        cut += [change] if kept(view.bucket, height, width) < CUT_WORTH_A_WARNING else []
    if problems:
        raise ValueError("\n".join(problems))
    if enlarged:
        log.warning("Pictures smaller than the training size are enlarged, which blurs them: %s", listed(enlarged))
    if cut:
        log.warning("More than a quarter is cut off of pictures this long: %s", listed(cut))
    return views


def _view(item: Item, picture: Picture, buckets: list[Bucket], host: Host) -> View:
    bucket = nearest(buckets, *picture.pixels.shape[1:])
    key = digest(fit(picture.pixels, bucket.height, bucket.width))
    if picture.mask is None:
        return View(bucket, key, None)
    mask = fit(picture.mask, bucket.height, bucket.width)
    if not mask.any():
        raise ValueError(f"The mask of {item.name} is black where the picture is trained: its white part is cut off")
    return View(bucket, key, F.adaptive_avg_pool2d(mask, _latent_size(bucket, host)))


def _latent_size(bucket: Bucket, host: Host) -> tuple[int, int]:
    return bucket.height // host.pixels_per_latent, bucket.width // host.pixels_per_latent


def _encode_captions(
    captions: Sequence[str], host: Host, cache: Cache, null: Conditioning, done: Counter
) -> dict[str, dict[str, Tensor]]:
    """Conditioning of each different caption."""
    # The name does not tell one text encoder from another; what it makes of the empty prompt does.
    encoder = digest(host.name, digest_named(null))
    rows = {}
    for caption in dict.fromkeys(captions):
        rows[caption] = cache.recall("text", digest(encoder, caption), partial(encode_prompt, host, caption))
        done()
    return rows


def _encode_views(
    items: Sequence[Item], views: Sequence[View], host: Host, cache: Cache, done: Counter
) -> list[Tensor]:
    """Latents (c, h, w), float32."""
    encoder = digest(host.name, encode_image(host, _probe(host), "the probe")["latent"]) if cache.folder else ""
    latents = []
    for item, view in zip(items, views, strict=True):
        latents.append(cache.recall("latent", digest(encoder, view.key), partial(_encode_view, host, item, view)))
        done()
    return [latent["latent"] for latent in latents]


def _encode_view(host: Host, item: Item, view: View) -> dict[str, Tensor]:
    pixels = load_picture(item.image, None, item.name).pixels
    return encode_image(host, fit(pixels, view.bucket.height, view.bucket.width), item.name)


def encode_image(host: Host, pixels: Tensor, name: str) -> dict[str, Tensor]:
    """The latent (c, h, w), float32, of pixels (3, h, w). ValueError for NaN, and for a size that the host denies."""
    with torch.no_grad():
        latents = host.encode_images(pixels[None].to(host.device))
    height, width = _latent_size(Bucket(*pixels.shape[1:]), host)
    if latents.ndim != 4 or latents.shape[0] != 1 or latents.shape[2:] != (height, width):
        raise ValueError(
            f"The image encoder of {host.name} made latents of the shape {tuple(latents.shape)} of {name}, "
            f"expected (1, channels, {height}, {width})"
        )
    if not latents.isfinite().all():
        raise ValueError(
            f"The latents of {name} contain NaN or infinity: the image encoder overflows. "
            "Run it in float32 or bfloat16 instead of float16"
        )
    return {"latent": latents[0].float()}


def encode_prompt(host: Host, prompt: str) -> Conditioning:
    """Conditioning (1, …) of one prompt. ValueError for what the host refuses, and for NaN."""
    try:
        with torch.no_grad():
            conditioning = host.encode_prompts([prompt])
    except ValueError as error:
        raise ValueError(f"The caption {prompt!r} cannot be encoded: {error}") from error
    for name, tensor in conditioning.items():
        if tensor.ndim < 1 or tensor.shape[0] != 1:
            raise ValueError(
                f"The text encoder of {host.name} made {name!r} of the shape {tuple(tensor.shape)}, expected (1, …)"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"The text encoding {name!r} of {prompt!r} contains NaN or infinity")
    return conditioning


def _probe(host: Host) -> Tensor:
    """A picture (3, h, w) whose latent tells one image encoder from another of the same name."""
    side = PROBE_TOKENS * host.pixels_per_token
    return torch.rand(3, side, side, generator=generator(0, "probe of an image encoder"))


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Counter:
    """Calls ``progress`` with one more piece done each time."""
    count = 0

    def done() -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count, total)

    return done
