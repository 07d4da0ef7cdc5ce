"""What an adapter does to one layer, apart from how files spell it.

Tensors have the names of :data:`.spelling.PEFT` without their ends:

lora: ``A`` (r, in[, k, k]), ``B`` (out, r[, 1, 1]) and, for DoRA, ``magnitude`` (out,);
loha: ``hada_w1_a`` (out, r), ``hada_w1_b`` (r, in) and the same with w2, or the Tucker form with ``hada_t1``, ``_t2``;
lokr: ``lokr_w1`` (a, c) and ``lokr_w2`` (b, d[, k, k]), out = ab, in = cd, each whole or as a product ``_a`` ``_b``;
oft: ``oft_R`` (blocks, n), the upper triangles of skew-symmetric blocks that rotate the layer's inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One layer's part of an adapter."""

    method: str  # "lora", "loha", "lokr" or "oft"
    tensors: Mapping[str, Tensor]
    scale: float = 1.0  # what the product of the tensors is multiplied by: alpha / rank

    @property
    def rank(self) -> int | None:
        """The inner dimension; None where nothing is factored, and for OFT the side of a block."""
        if self.method == "oft":
            return block_side(self.tensors["oft_R"].shape[1])
        # Of LoKr's two products the second counts, as in ComfyUI and LyCORIS.
        inner = [self.tensors[name] for name in ("A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in self.tensors]
        return inner[0].shape[0] if inner else None

    @property
    def inputs(self) -> int:
        """Input channels of the layer, times the kernel for some forms of a convolution."""
        tensors = self.tensors
        if self.method == "oft":
            return tensors["oft_R"].shape[0] * block_side(tensors["oft_R"].shape[1])
        if self.method == "lokr":
            return _kron_side(tensors, "lokr_w1", 1) * _kron_side(tensors, "lokr_w2", 1)
        return tensors["A" if self.method == "lora" else "hada_w1_b"].shape[1]

    @property
    def outputs(self) -> int:
        """Output channels of the layer. OFT does not know them: ValueError."""
        tensors = self.tensors
        if self.method == "oft":
            raise ValueError("a rotation of inputs does not tell the number of outputs")
        if self.method == "lokr":
            return _kron_side(tensors, "lokr_w1", 0) * _kron_side(tensors, "lokr_w2", 0)
        if "hada_t1" in tensors:
            return tensors["hada_w1_a"].shape[1]
        return tensors["B" if self.method == "lora" else "hada_w1_a"].shape[0]


def block_side(triangle: int) -> int:
    """b of b (b - 1) / 2 elements above a diagonal."""
    return round((1 + (1 + 8 * triangle) ** 0.5) / 2)


def folded(layer: Layer, scale: float = 1.0) -> Layer:
    """The same effect with another scale: the ratio goes into the tensor of output rows."""
    factor = layer.scale / scale
    if layer.method == "oft" or factor == 1:
        return replace(layer, scale=scale)
    names = {"lora": ("B",), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}[layer.method]
    tensors = {name: value * factor if name in names else value for name, value in layer.tensors.items()}
    return replace(layer, tensors=tensors, scale=scale)


def split(layer: Layer, parts: int, present: Sequence[bool] | None = None) -> tuple[Layer | None, ...]:
    """Layers for the stacked parts of a fused one: all have as many rows as it has inputs, the last has the rest.

    What :func:`merged` made comes apart again at its own ranks, with None for a part that is not ``present``
    (None = all are). Any other adapter shares its input side.
    """
    if layer.method == "oft":
        return (layer,) * parts
    sizes = [layer.inputs] * (parts - 1) + [layer.outputs - layer.inputs * (parts - 1)]
    ends = [sum(sizes[: index + 1]) for index in range(parts)]
    pieces = [rows(layer, range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    return _at_own_ranks(pieces, present or [True] * parts) or tuple(pieces)


def merged(layers: Sequence[Layer | None]) -> Layer | None:
    """One layer for stacked parts; None where no such adapter exists. A part that is None is left as it is.

    Parts that share their input side, as :func:`split` makes them, keep it. Otherwise the parts' ranks add up:
    [B_q A_q; B_k A_k; B_v A_v] = diag(B_q, B_k, B_v) [A_q; A_k; A_v], and likewise for both products of LoHa.
    A Kronecker product or a rotation of inputs has no such form.
    """
    first = next(layer for layer in layers if layer is not None)
    method, names, scale = first.method, set(first.tensors), first.scale
    layers = [None if layer is None else folded(layer, scale) for layer in layers]
    present = [layer for layer in layers if layer is not None]
    if any(layer.method != method or set(layer.tensors) != names for layer in present):
        return None
    if len(present) == len(layers) and (one := _sharing_inputs(present)):
        return one
    if method not in INNER or any(layer.tensors[name].dim() > 2 for layer in present for name in names):
        return None
    if "magnitude" in names and len(present) < len(layers):
        return None  # a norm of rows that the adapter knows nothing of
    return _at_summed_rank(layers, scale, first.inputs)


def _sharing_inputs(layers: Sequence[Layer]) -> Layer | None:
    """Stacked parts that differ in the tensors of output rows only; None for any others."""
    first = layers[0]
    shared = [name for name in first.tensors if name not in OUTPUT_ROWS]
    if not all(torch.equal(layer.tensors[name], first.tensors[name]) for layer in layers for name in shared):
        return None
    stacked = {name: torch.cat([layer.tensors[name] for layer in layers]) for name in OUTPUT_ROWS & set(first.tensors)}
    return replace(first, tensors={**first.tensors, **stacked})


def _at_summed_rank(layers: Sequence[Layer | None], scale: float, inputs: int) -> Layer:
    """Stacked parts, at a common scale, with an inner dimension that has a share for each."""
    present = [layer for layer in layers if layer is not None]
    rank = sum(layer.rank or 0 for layer in present)
    sizes = [layer.outputs if layer else _missing_rows(i, len(layers), inputs) for i, layer in enumerate(layers)]
    tensors = {}
    for outer, inner in INNER[present[0].method]:
        tensors[inner] = torch.cat([layer.tensors[inner] for layer in present])
        tensors[outer] = tensors[inner].new_zeros(sum(sizes), rank)
        row = column = 0
        for layer, size in zip(layers, sizes, strict=True):
            if layer:
                block = layer.tensors[outer]
                tensors[outer][row : row + size, column : column + block.shape[1]] = block
                column += block.shape[1]
            row += size
    if "magnitude" in present[0].tensors:
        tensors["magnitude"] = torch.cat([layer.tensors["magnitude"] for layer in present])
    return Layer(present[0].method, tensors, scale)


def rows(layer: Layer, keep: Sequence[int]) -> Layer:
    """The adapter of a layer that has only these output rows, in this order. ValueError where LoKr cannot."""
    index = torch.as_tensor(list(keep))
    if layer.method == "oft":
        return layer
    if layer.method == "lokr":
        index = _whole_blocks(index, _kron_side(layer.tensors, "lokr_w2", 0))
    # Tucker forms have their output side second; they only exist for convolutions, which are never cut.
    tensors = {name: value[index] if name in OUTPUT_ROWS else value for name, value in layer.tensors.items()}
    return replace(layer, tensors=tensors)


def swapped_halves(layer: Layer) -> Layer:
    """The adapter of a layer whose output halves have changed places."""
    if layer.method == "oft":
        return layer
    half = layer.outputs // 2
    return rows(layer, [*range(half, 2 * half), *range(half)])


def padded(layer: Layer, rank: int) -> Layer:
    """The same effect and scale at a higher rank: the added part of each product is zero."""
    more = rank - (layer.rank or rank)
    pairs = INNER.get(layer.method, ())
    if more <= 0 or "hada_t1" in layer.tensors:
        return layer
    tensors = dict(layer.tensors)
    for outer, inner in pairs:
        tensors[inner] = torch.cat([tensors[inner], tensors[inner].new_zeros(more, *tensors[inner].shape[1:])])
        after = (0, 0) * (tensors[outer].dim() - 2) + (0, more)
        tensors[outer] = F.pad(tensors[outer], after)
    return replace(layer, tensors=tensors)


def kronecker_as_lora(layer: Layer) -> Layer:
    """The same effect as a LoRA, of up to full rank: W1 (x) U V = (W1 (x) U) (1 (x) V). Not for Tucker forms."""
    tensors = layer.tensors
    first, second = _kron_factor(tensors, "lokr_w1"), tensors.get("lokr_w2")
    if second is None:
        u, v = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    else:
        u, v = second.flatten(1), torch.eye(second[0].numel()).to(second)
    a, b = torch.kron(torch.eye(first.shape[1]).to(v), v), torch.kron(first, u)
    if len(a) > min(b.shape[0], a.shape[1]):
        a, b = (b @ a, torch.eye(len(b)).to(b)) if b.shape[0] < a.shape[1] else (torch.eye(a.shape[1]).to(a), b @ a)
    return Layer("lora", {"A": a, "B": b}, layer.scale)


def product(layer: Layer) -> Tensor:
    """scale * (what is added to the weight), (out, in * kernel), before any norm. Not for OFT, which multiplies."""
    return layer.scale * _PRODUCTS[layer.method](layer.tensors)


def _lora_product(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["B"].flatten(1) @ tensors["A"].flatten(1)


def _loha_product(tensors: Mapping[str, Tensor]) -> Tensor:
    factors = []
    for index in "12":
        a, b = tensors[f"hada_w{index}_a"], tensors[f"hada_w{index}_b"]
        core = tensors.get(f"hada_t{index}")
        factors.append(a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a).flatten(1))
    return factors[0] * factors[1]


def _lokr_product(tensors: Mapping[str, Tensor]) -> Tensor:
    first, second = (_kron_factor(tensors, name) for name in ("lokr_w1", "lokr_w2"))
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second).flatten(1)


def _kron_factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    core = tensors.get("lokr_t2") if name == "lokr_w2" else None
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _kron_side(tensors: Mapping[str, Tensor], name: str, side: int) -> int:
    """Output rows (side 0) or input columns (side 1) of a factor of a Kronecker product."""
    if name in tensors:
        return tensors[name].shape[side]
    tucker = name == "lokr_w2" and "lokr_t2" in tensors
    return tensors[f"{name}_{'ab'[side]}"].shape[1 if tucker else side]


def _whole_blocks(index: Tensor, size: int) -> Tensor:
    """Rows of the first Kronecker factor, each ``size`` rows of the product."""
    blocks = index.view(-1, size) if len(index) % size == 0 else index[:, None]
    starts = blocks[:, 0]
    if blocks.shape[1] != size or (starts % size).any() or (blocks != starts[:, None] + torch.arange(size)).any():
        raise ValueError(
            f"this LoKr repeats blocks of {size} rows, which the parts of a fused layer cut through: "
            "it can only be written under native names (styles kohya and comfyui)"
        )
    return starts // size


def _missing_rows(index: int, parts: int, inputs: int) -> int:
    """Rows of a part without an adapter: as many as inputs, but FLUX's MLP, the last of four, has four times those."""
    return 4 * inputs if parts == 4 and index == 3 else inputs


def _at_own_ranks(pieces: list[Layer], present: Sequence[bool]) -> tuple[Layer | None, ...] | None:
    """Parts with their share of the inner dimensions; None if some part uses more than its own."""
    pairs, rank, count = INNER.get(pieces[0].method, ()), pieces[0].rank or 0, sum(present)
    if not pairs or rank % count:
        return None
    own: list[Layer | None] = []
    for piece, here in zip(pieces, present, strict=True):
        first = rank // count * sum(part is not None for part in own)
        mine = torch.zeros(rank, dtype=torch.bool)
        mine[first : first + rank // count] = here
        if any(piece.tensors[outer][:, ~mine].any() for outer, _ in pairs):
            return None
        cut = {outer: piece.tensors[outer][:, mine] for outer, _ in pairs}
        cut |= {inner: piece.tensors[inner][mine] for _, inner in pairs}
        own.append(replace(piece, tensors={**piece.tensors, **cut}) if here else None)
    return tuple(own)


# Tensors whose first dimension is the layer's output.
OUTPUT_ROWS = {"B", "magnitude", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a"}
# Products outer @ inner that share one inner dimension.
INNER = {"lora": (("B", "A"),), "loha": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))}
_PRODUCTS: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "lora": _lora_product,
    "loha": _loha_product,
    "lokr": _lokr_product,
}
