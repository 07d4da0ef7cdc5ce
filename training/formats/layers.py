"""What an adapter does to one layer, apart from how files spell it.

Tensors have the names of :data:`.spelling.PEFT` without their ends:

lora: ``A`` (r, in[, k, k]), ``B`` (out, r[, 1, 1]) and, for DoRA, ``magnitude`` (out,);
loha: ``hada_w1_a`` (out, r), ``hada_w1_b`` (r, in) and the same with w2, or the Tucker form with ``hada_t1``, ``_t2``;
lokr: ``lokr_w1`` (a, c) and ``lokr_w2`` (b, d[, k, k]), out = ab, in = cd, each whole or as a product ``_a`` ``_b``;
oft: ``oft_R`` (blocks, n), the upper triangles of skew-symmetric blocks that rotate the layer's inputs;
styleinject: ``styleinject_A`` (n, r, in[, k, k]), ``styleinject_B`` (out, r), and the router's ``styleinject_R``
(n, in) and ``styleinject_r`` (n,);
bottleneck: ``bottleneck_down`` (r, out) and ``bottleneck_up`` (out, r), behind the layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One layer's part of an adapter."""

    method: str  # "lora", "loha", "lokr", "oft", "styleinject" or "bottleneck"
    tensors: Mapping[str, Tensor]
    scale: float = 1.0  # what the product of the tensors is multiplied by: alpha / rank

    @property
    def rank(self) -> int | None:
        """The inner dimension; None where nothing is factored, and for OFT the side of a block."""
        if self.method == "oft":
            return block_side(self.tensors["oft_R"].shape[1])
        if self.method == "styleinject":
            return self.tensors["styleinject_B"].shape[1]
        if self.method == "bottleneck":
            return len(self.tensors["bottleneck_down"])
        # Of LoKr's two products the second counts, as in ComfyUI and LyCORIS.
        inner = [self.tensors[name] for name in ("A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in self.tensors]
        return inner[0].shape[0] if inner else None

    @property
    def inputs(self) -> int:
        """Input channels of the layer, times the kernel for some forms of a convolution; a bottleneck's own input's."""
        tensors = self.tensors
        if self.method == "oft":
            return tensors["oft_R"].shape[0] * block_side(tensors["oft_R"].shape[1])
        if self.method == "lokr":
            return kronecker_side(tensors, "lokr_w1", 1) * kronecker_side(tensors, "lokr_w2", 1)
        name = {"lora": "A", "styleinject": "styleinject_R", "bottleneck": "bottleneck_down"}.get(
            self.method, "hada_w1_b"
        )
        return tensors[name].shape[1]

    @property
    def outputs(self) -> int:
        """Output channels of the layer. OFT does not know them: ValueError."""
        tensors = self.tensors
        if self.method == "oft":
            raise ValueError("a rotation of inputs does not tell the number of outputs")
        if self.method == "lokr":
            return kronecker_side(tensors, "lokr_w1", 0) * kronecker_side(tensors, "lokr_w2", 0)
        if "hada_t1" in tensors:
            return tensors["hada_w1_a"].shape[1]
        name = {"lora": "B", "styleinject": "styleinject_B", "bottleneck": "bottleneck_up"}.get(
            self.method, "hada_w1_a"
        )
        return tensors[name].shape[0]


def block_side(triangle: int) -> int:
    """b of b (b - 1) / 2 elements above a diagonal."""
    return round((1 + (1 + 8 * triangle) ** 0.5) / 2)


def folded(layer: Layer, scale: float = 1.0) -> Layer:
    """The same effect with another scale: the ratio goes into the tensor of output rows."""
    factor = layer.scale / scale
    if layer.method == "oft" or factor == 1:
        return replace(layer, scale=scale)
    tensors = {name: value * factor if name in SCALED[layer.method] else value for name, value in layer.tensors.items()}
    return replace(layer, tensors=tensors, scale=scale)


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


def kronecker_side(tensors: Mapping[str, Tensor], name: str, side: int) -> int:
    """Output rows (side 0) or input columns (side 1) of a factor of a Kronecker product."""
    if name in tensors:
        return tensors[name].shape[side]
    tucker = name == "lokr_w2" and "lokr_t2" in tensors
    return tensors[f"{name}_{'ab'[side]}"].shape[1 if tucker else side]


# Tensors whose first dimension is the layer's output.
OUTPUT_ROWS = {"B", "magnitude", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a", "styleinject_B", "bottleneck_up"}
# The tensor, of several that may be there, that the product is multiplied by a number with.
SCALED = {
    "lora": ("B",),
    "loha": ("hada_w1_a",),
    "lokr": ("lokr_w1", "lokr_w1_a"),
    "styleinject": ("styleinject_B",),
    "bottleneck": ("bottleneck_up",),
}
# Products outer @ inner that share one inner dimension.
INNER = {"lora": (("B", "A"),), "loha": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))}
_PRODUCTS: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "lora": _lora_product,
    "loha": _loha_product,
    "lokr": _lokr_product,
}
