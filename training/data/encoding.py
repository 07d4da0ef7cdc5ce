"""From items to a dataset: every picture and caption through the model's encoders, once."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Conditioning
from ..hosts.host import Host
from ..randomness import generator
from .buckets import Bucket, enlargement, kept, make_buckets, nearest
from .cache import Cache, digest, digest_named, settle, settled
from .captions import Caption, complete, listed, tag_orders
from .concepts import PRIOR_SHARE
from .dataset import Dataset, Example, Spelling, shapes
from .images import Picture, check_mask, corner, fit, load_picture
from .items import Encoded, Item

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
    original: tuple[int, int]  # height and width in pixels, before it was resized

    @property
    def sizes(self) -> Tensor:
        """The conditioning SIZES (1, 6)."""
        target = (self.bucket.height, self.bucket.width)
        return torch.tensor([[*self.original, *corner(*self.original, *target), *target]])


def encode(
    items: Sequence[Item],
    host: Host,
    *,
    resolution: int,  # pixels: pictures are trained at about resolution² of them, where their concept says nothing
    style_phrase: str,  # "" = none, with complete captions
    caption_mode: str = "content",  # a key of CAPTION_MODES, where a concept says nothing
    caption_dropout: float = 0.0,  # share of draws that see the empty prompt instead
    prior_share: float = PRIOR_SHARE,  # share of batches for prior preservation, where there are items for it
    seed: int = 0,  # of the orders of tags
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
    captions = spellings(items, style_phrase, caption_mode, seed)
    views = survey(items, host, resolution)
    cache = Cache(cache_dir)
    texts = dict.fromkeys(text for texts in captions for text in texts)
    done = _counter(progress, len(texts) + sum(map(len, views)))
    null = settled(encode_prompt(host, "")) if caption_dropout or cache_dir is not None else None
    rows = _encode_captions(texts, host, cache, null, done)
    encoder = digest(host.name, encode_image(host, _probe(host), "the probe")["latent"]) if cache.folder else ""
    examples = [
        _example(item, view, [Spelling(text, rows[text]) for text in texts], latent, host.told_sizes)
        for item, texts, seen in zip(items, captions, views, strict=True)
        for view, latent in zip(seen, _encode_views(item, seen, host, encoder, cache, done), strict=True)
    ]
    return Dataset(examples, null, caption_dropout, prior_share)


def _example(item: Item, view: View, spelt: Sequence[Spelling], latent: Tensor, told_sizes: bool) -> Example:
    """Of the caption's orders those whose encoding has the shape of the first: a batch has one shape."""
    first, *others = spelt
    return Example(
        item.name,
        latent,
        first.conditioning,
        view.mask,
        first.caption,
        item.repeats,
        item.concept.weight,
        item.concept.role,
        tuple(other for other in others if shapes(other.conditioning) == shapes(first.conditioning)),
        view.sizes if told_sizes else None,
    )


def spellings(items: Sequence[Item], style_phrase: str, caption_mode: str, seed: int) -> list[list[str]]:
    """The complete captions of each item: the written one, and its tags in the further orders that are asked for.

    ValueError for captions that cannot be used, with the pictures named.
    """
    found: dict[int, list[str]] = {}
    for mode in dict.fromkeys(item.concept.caption_mode or caption_mode for item in items):
        ours = [n for n, item in enumerate(items) if (item.concept.caption_mode or caption_mode) == mode]
        written = complete([_caption(items[n], items[n].caption, style_phrase) for n in ours], mode)
        for n, text in zip(ours, written, strict=True):
            item = items[n]
            orders = tag_orders(item.caption, item.concept.orders, item.concept.keep, seed)[1:]
            found[n] = [text, *complete([_caption(item, order, style_phrase) for order in orders], mode)]
    return [found[n] for n in range(len(items))]


def _caption(item: Item, text: str, style_phrase: str) -> Caption:
    phrase = item.concept.style_phrase
    return Caption(item.name, text, style_phrase if phrase is None else phrase)


def survey(items: Sequence[Item], host: Host, resolution: int) -> list[list[View]]:
    """Opens every picture once and decides its sizes. ValueError with everything that cannot be used."""
    views: list[list[View]] = []
    problems: dict[str, None] = {}  # in order, each once
    poor = _Poor()
    for item in items:
        try:
            if isinstance(item.image, Encoded):
                views.append([_view_of_latent(item, item.image.latent, host)])
            else:
                views.append(_views(item, item.image, host, item.concept.resolutions or (resolution,), poor))
        except ValueError as error:
            problems[str(error)] = None
    if problems:
        raise ValueError("\n".join(problems))
    poor.warn()
    return views


@dataclass
class _Poor:
    """Pictures that a training size does not suit."""

    enlarged: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def note(self, name: str, bucket: Bucket, height: int, width: int) -> None:
        change = f"{name} ({width}x{height} to {bucket})"
        self.enlarged += [change] if enlargement(bucket, height, width) > 1 else []
        self.cut += [change] if kept(bucket, height, width) < CUT_WORTH_A_WARNING else []

    def warn(self) -> None:
        if self.enlarged:
            names = listed(self.enlarged)
            log.warning("Pictures smaller than the training size are enlarged, which blurs them: %s", names)
        if self.cut:
            log.warning("More than a quarter is cut off of pictures this long: %s", listed(self.cut))


def _views(item: Item, image: Tensor | Path, host: Host, sides: Sequence[int], poor: _Poor) -> list[View]:
    picture = load_picture(image, item.mask, item.name)
    height, width = picture.pixels.shape[1:]
    views = []
    for side in sides:
        bucket = nearest(make_buckets(side, host.pixels_per_token), height, width)
        views.append(_view(item, picture, bucket, host))
        poor.note(item.name, bucket, height, width)
    return views


def _view_of_latent(item: Item, latent: Tensor, host: Host) -> View:
    """Of a latent that came encoded; its mask is of any size. ValueError for one that the model does not take."""
    if latent.ndim != 3 or latent.shape[0] != host.latent_channels:
        raise ValueError(
            f"The latent of {item.name} has the shape {tuple(latent.shape)}, and {host.name} works on "
            f"({host.latent_channels}, height, width): encode the pictures with the VAE that belongs to the model"
        )
    if not latent.isfinite().all():
        raise ValueError(f"The latent of {item.name} contains NaN or infinity")
    rows, columns = latent.shape[1:]
    bucket = Bucket(rows * host.pixels_per_latent, columns * host.pixels_per_latent)
    original = (bucket.height, bucket.width)  # what it was before is not known
    if item.mask is None:
        return View(bucket, "", None, original)
    assert isinstance(item.mask, Tensor), "a latent has no file"
    mask = F.adaptive_avg_pool2d(check_mask(item.mask, item.name), (rows, columns))
    if not mask.any():
        raise ValueError(f"The mask of {item.name} is black all over: white marks what is learned")
    return View(bucket, "", mask, original)


def _view(item: Item, picture: Picture, bucket: Bucket, host: Host) -> View:
    key, (height, width) = digest(fit(picture.pixels, bucket.height, bucket.width)), picture.pixels.shape[1:]
    if picture.mask is None:
        return View(bucket, key, None, (height, width))
    mask = fit(picture.mask, bucket.height, bucket.width)
    if not mask.any():
        raise ValueError(f"The mask of {item.name} is black where the picture is trained: its white part is cut off")
    return View(bucket, key, F.adaptive_avg_pool2d(mask, _latent_size(bucket, host)), (height, width))


def _latent_size(bucket: Bucket, host: Host) -> tuple[int, int]:
    return bucket.height // host.pixels_per_latent, bucket.width // host.pixels_per_latent


def _encode_captions(
    captions: Iterable[str], host: Host, cache: Cache, null: Conditioning | None, done: Counter
) -> dict[str, dict[str, Tensor]]:
    """Conditioning of each caption."""
    # The name does not tell one text encoder from another; what it makes of the empty prompt does.
    encoder = digest(host.name, digest_named(null or {}))
    rows = {}
    for caption in captions:
        rows[caption] = cache.recall("text", digest(encoder, caption), partial(encode_prompt, host, caption))
        done()
    return rows


def _encode_views(
    item: Item, views: Sequence[View], host: Host, encoder: str, cache: Cache, done: Counter
) -> Iterator[Tensor]:
    """Latents (c, h, w), float32."""
    for view in views:
        if isinstance(item.image, Encoded):
            yield settle(item.image.latent.float())
        else:
            make = partial(_encode_view, host, item.image, item.name, view)
            yield cache.recall("latent", digest(encoder, view.key), make)["latent"]
        done()


def _encode_view(host: Host, image: Tensor | Path, name: str, view: View) -> dict[str, Tensor]:
    pixels = load_picture(image, None, name).pixels
    return encode_image(host, fit(pixels, view.bucket.height, view.bucket.width), name)


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
