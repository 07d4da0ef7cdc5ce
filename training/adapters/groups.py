"""Groups of a model's layers, told from their names alone: by depth, by what a layer does, by stream.

Blocks are the numbered parts of a model, in the order in which it runs them; ``early``, ``middle`` and ``late`` are
thirds of them. Layers outside of the blocks (embedders, the last layer) are in no third.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .targets import grouped

DEPTHS = ("early", "middle", "late")

# Kind of a layer -> a pattern for one part of its name, or two. The first that is found counts.
_KINDS: dict[str, str] = {
    # FLUX's single blocks compute attention and MLP in one layer.
    "fused": r"single_blocks\.\d+\.linear[12]|single_transformer_blocks\.\d+\.proj_out",
    "modulation": r"\w*(?:adaln|modulation)\w*|\w*_mod|mod|mod[CX]\d*|emb_layers|time_emb_proj|norm\w*\.linear",
    "attention": r"\w*attn\w*|\w*attention\w*|to_(?:q|k|v|out)|qkv|proj_(?:q|k|v)",
    "mlp": r"\w*mlp\w*|ff|ffn|\w*feed_forward\w*|ff_context|experts?|net",
    "convolution": r"\w*conv\w*|in_layers|out_layers|skip_connection|op",
}
_STREAMS: dict[str, str] = {
    "cross": r"attn2|cross_attn\w*",
    "text": r"txt_\w+|context_block|add_[qkv]_proj|to_add_out|ff_context|to_(?:q|k|v|out)_t|ff_t|mlpC"
    r"|double_layers\.\d+\.attn\.w1[qkvo]",
    "image": r"img_\w+|x_block|to_(?:q|k|v|out)|ff_i|mlpX|double_layers\.\d+\.attn\.w2[qkvo]",
}
_BLOCK = re.compile(r"(?:.*?\.)??\w*(?:block|layer|refiner)\w*\.\d+(?=\.)")


@dataclass(frozen=True)
class Groups:
    """Which groups every layer of a model is in. Made by :func:`groups_of`."""

    by_layer: Mapping[str, frozenset[str]]

    @property
    def names(self) -> list[str]:
        """The groups that exist in this model."""
        found = frozenset().union(*self.by_layer.values())
        return [name for name in ("all", *DEPTHS, *_KINDS, *_STREAMS, "other") if name in found]

    def layers(self, pattern: str) -> list[str]:
        """The layers that a pattern means: a group's name, or parts of names such as ``double_blocks.0-7.img_attn``.

        ``*`` in a part stands for anything, and ``0-7`` for the numbers from 0 to 7. ValueError lists what exists
        where nothing is meant.
        """
        if pattern in self.names:
            return [name for name, groups in self.by_layer.items() if pattern in groups]
        wanted = pattern.split(".")
        found = [name for name in self.by_layer if _contains(name.split("."), wanted)]
        if not found:
            raise ValueError(
                f"{pattern!r} is no group of this model's layers and no part of their names: the groups are "
                f"{', '.join(self.names)}; the layers are {', '.join(grouped(self.by_layer))}"
            )
        return found


def groups_of(names: Iterable[str]) -> Groups:
    """The groups of all the layers of a model, whose names come in the model's own order."""
    names = list(names)
    blocks = list(dict.fromkeys(block for name in names if (block := block_of(name))))
    third = {block: DEPTHS[(6 * index + 3) // (2 * len(blocks))] for index, block in enumerate(blocks)}
    traits = {name: _traits(name, third) for name in names}
    if not any("text" in found for found in traits.values()):  # nothing to tell the image's stream from
        traits = {name: found - {"image"} for name, found in traits.items()}
    return Groups({name: frozenset({"all"} | found) for name, found in traits.items()})


def block_of(name: str) -> str | None:
    """The outermost numbered block that a layer is in, ``double_blocks.3``; None outside of them."""
    match = _BLOCK.match(name)
    return match[0] if match else None


def _traits(name: str, third: Mapping[str, str]) -> set[str]:
    block, parts = block_of(name), f".{name}."
    if block is None:
        return {"other"}
    kind = next((kind for kind, pattern in _KINDS.items() if _has(parts, pattern)), "other")
    return {third[block], kind, *(stream for stream, pattern in _STREAMS.items() if _has(parts, pattern))}


def _has(parts: str, pattern: str) -> bool:
    return re.search(rf"\.(?:{pattern})\.", parts, re.IGNORECASE) is not None


def _contains(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the wanted parts stand next to each other somewhere in a name."""
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(_agrees, parts[start:], wanted)) for start in starts)


def _agrees(part: str, wanted: str) -> bool:
    if span := re.fullmatch(r"(\d+)-(\d+)", wanted):
        return part.isdecimal() and int(span[1]) <= int(part) <= int(span[2])
    return fnmatchcase(part, wanted)


def read_strengths(text: str) -> dict[str, float]:
    """Lines ``pattern = strength``. ValueError names one that is none."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pattern, equals, value = (part.strip() for part in line.partition("="))
        try:
            if not (pattern and equals):
                raise ValueError
            found[pattern] = float(value)
            if not math.isfinite(found[pattern]):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{line.strip()!r} is no strength of a group: expected lines such as 'late = 0.5' or "
                "'double_blocks.0-7 = 0'"
            ) from None
    return found


def layer_strengths(groups: Groups, strengths: Mapping[str, float]) -> dict[str, float]:
    """The factor of every layer: the product of the strengths of all patterns that mean it. ValueError as above."""
    factors = dict.fromkeys(groups.by_layer, 1.0)
    for pattern, strength in strengths.items():
        for name in groups.layers(pattern):
            factors[name] *= strength
    return factors
