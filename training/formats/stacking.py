"""Adapters of stacked layers: one on a fused layer taken apart into its parts', and the parts' put together.

A fused layer has the output rows of its parts one above the other, all on the same input.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .layers import INNER, OUTPUT_ROWS, Layer, folded, kronecker_side


def split(layer: Layer, parts: int, present: Sequence[bool] | None = None) -> tuple[Layer | None, ...]:
    """Layers for the stacked parts of a fused one: all have as many rows as it has inputs, the last has the rest.

    What :func:`merged` made comes apart again at its own ranks, with None for a part that is not ``present``
    (None = all are that do anything). Any other adapter shares its input side.
    """
    if layer.method == "oft":
        return (layer,) * parts
    if layer.method == "bottleneck":
        return _bottlenecks(layer, parts)
    sizes = [layer.inputs] * (parts - 1) + [layer.outputs - layer.inputs * (parts - 1)]
    ends = [sum(sizes[: index + 1]) for index in range(parts)]
    pieces = [rows(layer, range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    return _at_own_ranks(pieces, present or _acting(pieces)) or tuple(pieces)


def _bottlenecks(layer: Layer, parts: int) -> tuple[Layer | None, ...]:
    """Those of keys and of values, of two in one: each sees and changes its own rows, in the halves of the width.

    ValueError for a bottleneck that mixes the parts: behind one of them alone nothing acts like it.
    """
    down, up = layer.tensors["bottleneck_down"], layer.tensors["bottleneck_up"]
    rank, found = len(down) // 2, {}
    for half in (slice(0, rank), slice(rank, 2 * rank)):
        seen = down[half].any(0).nonzero().flatten().tolist() or [0]
        own = slice(seen[0], seen[-1] + 1)
        size = own.stop - own.start
        alone = torch.zeros(layer.outputs, dtype=torch.bool)
        alone[own] = True
        if own.start % size or own.start // size in found or up[~alone, half].any():
            raise ValueError(
                "this bottleneck was trained behind a layer that stacks several, as ComfyUI has them, and looks at all "
                "of them at once, while diffusers has a layer for each: load it in ComfyUI, or train with the targets "
                "kv_text or kv_both, which have a bottleneck for keys and one for values in either"
            )
        own_tensors = {"bottleneck_down": down[half, own], "bottleneck_up": up[own, half]}
        found[own.start // size] = replace(layer, tensors=own_tensors)
    return tuple(found.get(part) for part in range(parts))


def merged(layers: Sequence[Layer | None]) -> Layer | None:
    """One layer for stacked parts; None where no such adapter exists. A part that is None is left as it is.

    Parts that share their input side, as :func:`split` makes them, keep it. Otherwise the parts' ranks add up:
    [B_q A_q; B_k A_k; B_v A_v] = diag(B_q, B_k, B_v) [A_q; A_k; A_v], and likewise for both products of LoHa.
    A Kronecker product, a rotation of inputs or a bottleneck has no such form.
    """
    first = next(layer for layer in layers if layer is not None)
    method, names, scale = first.method, set(first.tensors), first.scale
    layers = [None if layer is None else folded(layer, scale) for layer in layers]
    present = [layer for layer in layers if layer is not None]
    if method in ("glora", "bottleneck") or any(
        layer.method != method or set(layer.tensors) != names for layer in present
    ):
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
        index = _whole_blocks(index, kronecker_side(layer.tensors, "lokr_w2", 0))
    # Tucker forms have their output side second; they only exist for convolutions, which are never cut.
    tensors = {name: value[index] if name in OUTPUT_ROWS else value for name, value in layer.tensors.items()}
    return replace(layer, tensors=tensors)


def swapped_halves(layer: Layer) -> Layer:
    """The adapter of a layer whose output halves have changed places."""
    if layer.method == "oft":
        return layer
    half = layer.outputs // 2
    return rows(layer, [*range(half, 2 * half), *range(half)])


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


def _acting(pieces: Sequence[Layer]) -> list[bool]:
    """Which parts are changed; all, where none is."""
    outer = [name for name, _ in INNER.get(pieces[0].method, ())]
    acting = [all(bool(piece.tensors[name].any()) for name in outer) for piece in pieces]
    return acting if any(acting) else [True] * len(pieces)


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
