"""OFT (arXiv 2306.07280) as peft trains it, written so that ComfyUI applies it.

peft rotates a layer's inputs: x becomes x R, so the weight becomes W R^T, with R = diag(R_1, R_2, …) and every R_i the
Cayley transform of a skew-symmetric Q_i, by default as the truncated series I + 2Q + 2Q^2 + 2Q^3 + Q^4. ComfyUI's own
OFT rotates outputs, which is another adapter. Its GLoRA adds W a1 a2 + b1 b2: with a1 = Q^T and a2 = (R^T - I) / Q^T,
which is a polynomial, that is exactly W (R^T - I), and Q can be read back.
"""

import torch
from torch import Tensor

from .layers import Layer, block_side

SERIES = (2.0, 2.0, 2.0, 1.0)  # of (R - I) / Q in powers of Q: peft's num_cayley_neumann_terms = 5, its default


def to_glora(layer: Layer, outputs: int) -> Layer:
    """The product form of a rotation; ``outputs`` = rows of the weight. Takes 2 inputs^2 numbers instead of few."""
    blocks = skew_blocks(layer.tensors["oft_R"]).transpose(1, 2)
    power, rest = torch.eye(blocks.shape[-1]).to(blocks), torch.zeros_like(blocks)
    for coefficient in SERIES:
        rest, power = rest + coefficient * power, power @ blocks
    tensors = {"a1": torch.block_diag(*blocks), "a2": torch.block_diag(*rest)}
    # ComfyUI tells two orders of a1 and a2 apart by the shapes of all four. Ours fit one where the layer is square
    # and none where it is not; either way b1 b2 is zero, and a1 a2 = a2 a1.
    tensors["b1"] = blocks.new_zeros(outputs, 1)
    tensors["b2"] = blocks.new_zeros(1, layer.inputs)
    return Layer("glora", tensors)


def from_glora(layer: Layer, side: int) -> Layer | None:
    """The rotation of blocks of ``side`` inputs that :func:`to_glora` wrote; None for any other GLoRA."""
    transposed = layer.tensors["a1"]
    count = transposed.shape[0] // side
    if transposed.is_meta:  # only a file's outline: it is what its metadata say
        return Layer("oft", {"oft_R": transposed.new_empty(count, side * (side - 1) // 2)})
    blocks = torch.stack([transposed[i * side : (i + 1) * side, i * side : (i + 1) * side].T for i in range(count)])
    rows, columns = torch.triu_indices(side, side, 1)
    rotation = Layer("oft", {"oft_R": blocks[:, rows, columns]})
    again = to_glora(rotation, layer.tensors["b1"].shape[0]).tensors
    same = (again[name].shape == value.shape for name, value in layer.tensors.items())
    close = (torch.allclose(again[name], value, atol=1e-2) for name, value in layer.tensors.items())
    return rotation if all(same) and all(close) else None


def skew_blocks(triangles: Tensor) -> Tensor:
    """Skew-symmetric matrices (blocks, b, b) from what is above their diagonals, (blocks, b (b - 1) / 2)."""
    side = block_side(triangles.shape[1])
    rows, columns = torch.triu_indices(side, side, 1)
    above = triangles.new_zeros(len(triangles), side, side)
    above[:, rows, columns] = triangles
    return above - above.transpose(1, 2)
