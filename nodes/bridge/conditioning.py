"""CONDITIONING that a user made, in the place of captions: what a model takes of it is used, all else is refused.

Of an entry of a CONDITIONING a model takes the encoded text and whatever its own ``extra_conds`` knows: pooled
outputs, guidance, sizes, reference latents. Areas, masks, ControlNets, hooks and ranges of steps belong to sampling.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...training.data.cache import digest, settle

# Entries that a sampler reads and a training step would not, by the node that they come from.
OF_SAMPLING = {
    "area": "Conditioning (Set Area)",
    "mask": "Conditioning (Set Mask)",
    "control": "Apply ControlNet",
    "hooks": "hooks",
    "gligen": "GLIGEN",
    "start_percent": "ConditioningSetTimestepRange",
    "end_percent": "ConditioningSetTimestepRange",
    "timestep_start": "a range of noise levels",
    "timestep_end": "a range of noise levels",
    "clip_start_percent": "scheduled CLIP hooks",
    "clip_end_percent": "scheduled CLIP hooks",
}
NO_RANGE = {"start_percent": 0.0, "end_percent": 1.0, "clip_start_percent": 0.0, "clip_end_percent": 1.0}


@dataclass(frozen=True)
class EncodedCaptions:
    """Captions that stand for conditioning: ``answers`` has each one's, in the form of a prompt table's."""

    captions: tuple[str, ...]
    answers: Mapping[str, dict[str, Any]]


def encoded_captions(conditionings: Sequence[list]) -> EncodedCaptions:
    """One caption for every row of every entry of a list of CONDITIONINGs, named by a hash of what it holds.

    ValueError for entries that a training step would ignore.
    """
    answers = [row for conditioning in conditionings for entry in conditioning for row in _rows(*entry)]
    if not answers:
        raise ValueError("the conditioning is empty: encode a caption, or write captions instead")
    for number, answer in enumerate(answers, start=1):
        _refuse_what_is_for_sampling(answer, number)
    captions = [f"[conditioning {digest(*_parts(answer))[:12]}]" for answer in answers]
    return EncodedCaptions(tuple(captions), dict(zip(captions, answers, strict=True)))


def _rows(cross_attention: Tensor | None, rest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An entry's rows, each as a prompt table's answer. Tensors of the entry's batch are cut with it."""
    answer = {**rest} if cross_attention is None else {**rest, "cross_attn": cross_attention}
    count = 1 if cross_attention is None else len(cross_attention)
    return [{name: _settled(_row(value, row, count)) for name, value in answer.items()} for row in range(count)]


def _row(value: Any, row: int, count: int) -> Any:
    is_batch = count > 1 and isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
    return value[row : row + 1] if is_batch else value


def _settled(value: Any) -> Any:
    """Tensors that autograd accepts, wherever they are in an answer."""
    if isinstance(value, Tensor):
        return settle(value)
    return [_settled(each) for each in value] if isinstance(value, list) else value


def _refuse_what_is_for_sampling(answer: Mapping[str, Any], number: int) -> None:
    used = {name: value for name, value in answer.items() if value is not None and NO_RANGE.get(name) != value}
    found = sorted({node for name, node in OF_SAMPLING.items() if name in used})
    if found:
        raise ValueError(
            f"conditioning {number} carries what only sampling knows ({', '.join(found)}), and training would ignore "
            "it: link the conditioning from before those nodes"
        )
    text = answer.get("cross_attn")
    if text is not None and not bool(text.isfinite().all()):
        raise ValueError(f"conditioning {number} contains NaN or infinity: run the text encoder in float32")


def _parts(value: Any) -> Iterator[str | Tensor]:
    """A nested value as what can be hashed; objects count by their kind."""
    match value:
        case Tensor():
            yield value
        case Mapping():
            for name in sorted(value):
                yield name
                yield from _parts(value[name])
        case list() | tuple():
            yield str(len(value))
            for each in value:
                yield from _parts(each)
        case str() | int() | float() | bool() | None:
            yield repr(value)
        case _:
            yield type(value).__qualname__
