"""Adapters at a lower rank: the nearest product of that rank to each layer's, and what is lost.

For B A with the thin QR decompositions B = Q_b R_b and A^T = Q_a R_a, the singular values of the small R_b R_a^T are
those of the product, which is never formed. To cut them is the best one can do (Eckart and Young, 1936). Arithmetic in
float64: factors of trained adapters can be badly conditioned.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.methods import UNMERGEABLE
from ..data.captions import listed
from .contents import AdapterFile, read_adapter
from .keys import FAMILIES, UNET_LAYERS
from .layers import Layer, kronecker_as_lora, product
from .metadata import NORM_KEY, PREFIX, STYLE_KEY, build_metadata
from .spelling import style_of
from .state import write_atomically
from .styles import MERGED, styled

# How a rank is found: by itself, by the share of squared singular values that is kept, by the ratio of the largest
# singular value to the smallest that is kept.
BY_RANK, BY_ENERGY, BY_RATIO = "rank", "energy", "ratio"


@dataclass(frozen=True)
class Cut:
    """What is to be kept of every layer."""

    by: str = BY_RANK
    value: float = 8.0
    most: int | None = None  # a limit of the rank, however it is found

    def __post_init__(self) -> None:
        if self.by not in _RULES:
            raise ValueError(f"an adapter is resized by {self.by!r}: expected one of {', '.join(_RULES)}")
        low, high, meaning = _LIMITS[self.by]
        if not low <= self.value <= high:
            raise ValueError(f"{self.by} is {self.value:g}: expected {meaning}")
        if self.most is not None and self.most < 1:
            raise ValueError(f"the largest rank is {self.most}: expected at least 1")

    def rank(self, values: Tensor) -> int:
        """Of a layer with these singular values (r,), largest first; at least 1, at most r."""
        wanted = _RULES[self.by](values, self.value)
        return max(1, min(wanted, len(values), self.most or len(values)))


@dataclass(frozen=True)
class Resized:
    """An adapter at lower ranks."""

    layers: Mapping[str, Layer]  # LoRA all of them, with a scale of 1
    kept: Mapping[str, float]  # share of each layer's energy, the sum of its squared singular values

    @property
    def energy(self) -> float:
        """The share that is kept of the layer that loses most."""
        return min(self.kept.values())

    def summary(self) -> str:
        ranks = sorted({layer.rank or 0 for layer in self.layers.values()})
        lost = [1 - share for share in self.kept.values()]
        worst = max(self.kept, key=lambda name: 1 - self.kept[name])
        return (
            f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") + f" in {len(self.layers)} layers; of "
            f"the squared change of the weights {100 * sum(lost) / len(lost):.2g} % is lost on average, and at most "
            f"{100 * max(lost):.2g} %, in {worst}"
        )


def resize_layers(layers: Mapping[str, Layer], cut: Cut) -> Resized:
    """Every layer at the rank of ``cut``. ValueError names one that is no sum of weights, as OFT's, or holds NaN."""
    require_finite(layers)
    small, kept = {}, {}
    for name, layer in layers.items():
        small[name], kept[name] = resize_layer(as_lora(name, layer), cut)
    return Resized(small, kept)


def require_finite(layers: Mapping[str, Layer]) -> None:
    """ValueError names layers that hold NaN."""
    # One by one in float32: torch cannot ask float8 whether it is finite.
    bad = [
        name
        for name, layer in layers.items()
        if not all(bool(tensor.float().isfinite().all()) for tensor in layer.tensors.values())
    ]
    if bad:
        raise ValueError(
            f"NaN or infinite values are in {listed(bad)}: the adapter's training went wrong, or its file was damaged"
        )


@torch.no_grad()
def resize_layer(layer: Layer, cut: Cut) -> tuple[Layer, float]:
    """A LoRA at a lower rank, with a scale of 1, and the share of its energy that is kept. Magnitudes stay (DoRA)."""
    a, b = layer.tensors["A"], layer.tensors["B"]
    left, values, right = singular(b.flatten(1), layer.scale * a.flatten(1).double())
    rank = cut.rank(values)
    root = values[:rank].sqrt()  # the factors share the size of the product
    tensors = {
        **layer.tensors,
        "B": (left[:, :rank] * root).reshape(len(b), rank, *b.shape[2:]).to(b.dtype),
        "A": (root[:, None] * right[:rank]).reshape(rank, *a.shape[1:]).to(a.dtype),
    }
    energy = values.square().sum()
    share = 1.0 if energy == 0 else float(values[:rank].square().sum() / energy)
    return Layer("lora", tensors, 1.0), share


def singular(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), s (k,), V^T (k, in) of B A in float64, with k the smallest of out, in and the rank."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, v @ q_a.T


def as_lora(name: str, layer: Layer) -> Layer:
    """The same effect as a LoRA, of whatever rank. ValueError for what is none."""
    if layer.method == "lora":
        return layer
    if "magnitude" in layer.tensors or layer.method not in ("loha", "lokr"):
        hint = ": StyleInject to LoRA makes one of it" if layer.method in UNMERGEABLE else ""
        raise ValueError(
            f"the layer {name} is {layer.method}, which is no sum of weights, and has no rank to lower{hint}"
        )
    if "hada_t1" in layer.tensors or any(tensor.dim() > 2 for tensor in layer.tensors.values()):
        return _from_product(layer)
    return kronecker_as_lora(layer) if layer.method == "lokr" else hadamard_as_lora(layer)


def hadamard_as_lora(layer: Layer) -> Layer:
    """(W1a W1b) o (W2a W2b) as one product of rank r^2: its columns are all products of a column of each."""
    w1_a, w1_b, w2_a, w2_b = (layer.tensors[f"hada_w{i}_{side}"] for i in "12" for side in "ab")
    if len(w1_b) * len(w2_b) >= min(len(w1_a), w1_b.shape[1]):
        return _from_product(layer)
    b = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    a = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return Layer("lora", {"A": a, "B": b}, layer.scale)


def _from_product(layer: Layer) -> Layer:
    """By the whole product, for the forms that are no product of two matrices."""
    weight = product(layer)
    unit = torch.eye(min(weight.shape)).to(weight)
    a, b = (weight, unit) if weight.shape[0] < weight.shape[1] else (unit, weight)
    return Layer("lora", {"A": a, "B": b}, 1.0)


def resize_file(file: AdapterFile, cut: Cut) -> tuple[AdapterFile, Resized]:
    """The same file at lower ranks: same names, same style, and its metadata with the new rank and what was done."""
    if file.unknown:
        raise ValueError(
            f"{file.path} has {len(file.unknown)} tensors that we do not understand, for example {file.unknown[0]}: "
            "they would be lost"
        )
    resized = resize_layers(file.layers, cut)
    said = {"resized": f"by {cut.by} {cut.value:g}: {resized.summary()}"}
    return rewritten(file, resized.layers, said), resized


def rewritten(file: AdapterFile, layers: Mapping[str, Layer], said: Mapping[str, str]) -> AdapterFile:
    """The file with other LoRA layers: same names, same style, and its metadata with the new rank and what is said."""
    style = file.header.get(STYLE_KEY) or style_of(file.tensors) or "comfyui"
    norm = file.header.get(NORM_KEY, MERGED)
    family = file.family if file.family in FAMILIES else ""
    written = styled(layers, style, family or "", norm=norm, unet_layers=_unet_layers(file))
    rank = max(layer.rank or 1 for layer in layers.values())
    header, about = dict(file.header), file.about
    if about is not None:
        dora = any("magnitude" in layer.tensors for layer in layers.values())
        about = replace(about, method="dora" if dora else "lora", rank=rank, alpha=None)
        header.pop(f"{PREFIX}alpha", None)
        header |= build_metadata(about)
    elif "ss_network_dim" in header:
        header |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    header |= {f"{PREFIX}{name}": words for name, words in said.items()}
    return AdapterFile(file.path, header, about, layers, (), written.tensors)


def resize_adapter(source: Path, target: Path, cut: Cut) -> Resized:
    """Writes an adapter's file at lower ranks. ValueError for one that has no rank to lower."""
    file, resized = resize_file(read_adapter(source), cut)
    write_file(target, file)
    return resized


def write_file(path: Path, file: AdapterFile) -> None:
    """Writes what is in memory, whole or not at all."""
    kept = {key: value.detach().cpu().contiguous().clone() for key, value in file.tensors.items()}
    write_atomically(path, lambda temporary: save_file(kept, temporary, dict(file.header)))


def _unet_layers(file: AdapterFile) -> int:
    return file.about.unet_layers if file.about else UNET_LAYERS


def _by_energy(values: Tensor, share: float) -> int:
    kept = values.square().cumsum(0)
    return int((kept < share * kept[-1] * (1 - 1e-12)).sum()) + 1


def _by_ratio(values: Tensor, ratio: float) -> int:
    return int((values * ratio >= values[0]).sum())


_RULES: dict[str, Callable[[Tensor, float], int]] = {
    BY_RANK: lambda values, rank: int(rank),
    BY_ENERGY: _by_energy,
    BY_RATIO: _by_ratio,
}
_LIMITS = {
    BY_RANK: (1, math.inf, "at least 1"),
    BY_ENERGY: (0, 1, "a share from 0 to 1, for example 0.95"),
    BY_RATIO: (1, math.inf, "at least 1, for example 20"),
}
