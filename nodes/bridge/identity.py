"""What a run is recognised by, over restarts of ComfyUI: hashes of what is linked, taken without encoding anything.

Of weights a few numbers of every tensor are read, which tell one model from another of the same shape. What other
nodes patched in counts too, by the numbers it holds; functions count by their names and what they were made with.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ...training.data.cache import digest
from ...training.data.items import Encoded, Item
from ...training.denoiser import Denoiser
from ...training.loops.subject import kind_of
from .families import model_name
from .functions import sample, traits
from .windowed import KEY, windowed_adapters

ACTING = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)  # wrappers that are called in training
LENGTH = 12  # hexadecimal digits of a hash


def identity_of(
    denoiser: Denoiser,
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP | None,
    vae: comfy.sd.VAE | None,
    items: Sequence[Item],
    caption_mode: str,
    prior_share: float,
) -> dict[str, Any]:
    """The identity of a run on these, for :func:`~stylewright.training.loops.train.train`."""
    return {
        "model": {**kind_of(denoiser), **what_acts(model)},
        "encoders": {
            "clip": "none" if clip is None else digest_of_clip(clip),
            "vae": "none" if vae is None else digest_of_model(vae.patcher),
        },
        "data": {
            "pictures": len(items),
            "caption_mode": caption_mode,
            "prior_share": prior_share,
            "fingerprint": digest_of_items(items),
        },
    }


def what_acts(model: comfy.model_patcher.ModelPatcher) -> dict[str, str]:
    """A model's kind, weights and patches, and what other nodes made it compute otherwise by."""
    described = {"name": model_name(model), "weights": digest_of_model(model)}
    if acting := functions_on(model):
        described["functions"] = _hash(*_pieces(traits(acting)))
    if adapters := windowed_adapters(model):
        described["adapters"] = _hash(*_pieces([each.described() for each in adapters]))
    return described


def digest_of_model(model: comfy.model_patcher.ModelPatcher) -> str:
    """Of a model's own weights, whether it is loaded and patched now or not, and of its patches."""
    pieces = list(_pieces([_weights(model), model.patches, model.object_patches]))
    return _hash(*pieces)


def digest_of_clip(clip: comfy.sd.CLIP) -> str:
    """Of a text encoder, its patches, and the layer that it stops at."""
    return _hash(clip.layer_idx, digest_of_model(clip.patcher))


def digest_of_weights(model: comfy.model_patcher.ModelPatcher) -> str:
    """Of a model's own weights alone."""
    return _hash(*_pieces(_weights(model)))


def digest_of_patch(patch: object) -> str:
    """Of an entry of a MODEL's ``patches``."""
    return _hash(*_pieces(patch))


def functions_on(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """What other nodes made the model compute otherwise by, where training goes through it too; nothing of samplers."""
    options = model.model_options["transformer_options"]
    wrappers = [
        (kind, found)
        for source in (model.wrappers, options.get("wrappers", {}))
        for kind in ACTING
        # Adapters of ours are told by their numbers.
        if any(found := [each for key, each in source.get(kind, {}).items() if not str(key).startswith(KEY)])
    ]
    acting = {name: value for name, value in options.items() if value and name not in ("wrappers", "callbacks")}
    return {**acting, "wrappers": wrappers} if wrappers else acting


def digest_of_items(items: Iterable[Item]) -> str:
    """Of pictures, masks and captions. ValueError names a file that cannot be read."""
    rows = ([field.name, getattr(item, field.name)] for item in items for field in fields(item) if field.name != "name")
    return _hash(*(_substance(value) for row in rows for value in row))


def _hash(*parts: Any) -> str:
    return digest(*(part if isinstance(part, Tensor | str | int) else repr(part) for part in parts))[:LENGTH]


def _substance(value: Any) -> Any:
    if isinstance(value, Path):
        return _content(value)
    return value.latent if isinstance(value, Encoded) else value


def _content(file: Path) -> str:
    try:
        return digest(torch.frombuffer(bytearray(file.read_bytes() or b" "), dtype=torch.uint8))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def _weights(model: comfy.model_patcher.ModelPatcher) -> dict[str, Tensor]:
    """The weights as they are without patches, which ComfyUI writes into them while a model is loaded."""
    own = dict(model.model.named_parameters())
    return own | {name: saved.weight for name, saved in model.backup.items() if name in own}


def _pieces(value: Any) -> Iterator[Tensor | str]:
    """A nested value as what can be hashed."""
    match value:
        case Tensor():
            yield sample(value)
        case nn.Module():
            yield from _pieces([type(value).__name__, *value.state_dict().values()])
        case WeightAdapterBase():
            yield from _pieces([value.name, value.weights])
        case Mapping():
            yield from _pieces([part for name in sorted(value, key=str) for part in (name, value[name])])
        case list() | tuple():
            yield repr(len(value))
            for part in value:
                yield from _pieces(part)
        case str() | int() | float() | bool() | None | torch.dtype() | torch.device():
            yield repr(value)
        case _:
            yield from _pieces(traits(value))
