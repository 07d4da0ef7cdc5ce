"""Negative prompts of a CONDITIONING, told to a model as the model itself would be told of them.

Of several entries each gives an answer of its own, and the answers are averaged, weighted by the entries' strengths:
one text after another in the same attention would be another thing. An entry with a range of steps counts in it only.
An entry is empty, and left out, that has no tokens or nothing but zeros, as ConditioningZeroOut makes them; what a
text encoder makes of "" is a text like any other, which nobody can tell from the tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
from torch import Tensor

OF_PLACES = {
    "area": "Conditioning (Set Area)",
    "mask": "Conditioning (Set Mask)",
    "control": "Apply ControlNet",
    "hooks": "hooks",
    "gligen": "GLIGEN",
}


@dataclass(frozen=True)
class Encoded:
    """One negative prompt, as a model takes it. ``weight``: its share of the average."""

    weight: float
    conds: Mapping[str, comfy.conds.CONDRegular]  # arguments of apply_model, c_crossattn among them

    @property
    def text(self) -> Tensor:
        """c_crossattn (rows, tokens, width), of as many rows as the CONDITIONING has."""
        return self.conds["c_crossattn"].cond

    def rows(self, count: int) -> dict[str, Any]:
        """The arguments of ``apply_model`` for a batch of ``count``."""
        return {name: cond.process_cond(batch_size=count, area=None).cond for name, cond in self.conds.items()}


class Negatives:
    """The entries of a negative CONDITIONING that say something, where the user left them."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def widths(self) -> set[int]:
        """Of the encoded text."""
        return {entry["cross_attn"].shape[-1] for entry in self._entries}

    def encode(self, model: Any, x: Tensor) -> list[tuple[Encoded, float | None, float | None]]:
        """Of a BaseModel, for latents like ``x``: each prompt, and the sigmas between which it counts."""
        entries = [dict(entry) for entry in self._entries]
        comfy.samplers.calculate_start_end_timesteps(model, entries)
        entries = comfy.samplers.encode_model_conds(model.extra_conds, entries, x, x.device, "negative")
        return [
            (
                Encoded(float(entry.get("strength", 1.0)), _on_device(entry["model_conds"], x)),
                entry.get("timestep_start"),
                entry.get("timestep_end"),
            )
            for entry in entries
        ]


def _on_device(conds: Mapping[str, comfy.conds.CONDRegular], x: Tensor) -> dict[str, comfy.conds.CONDRegular]:
    """Moved once a run, and not in every call."""
    return {
        name: cond._copy_with(cond.cond.to(x.device)) if isinstance(cond.cond, Tensor) else cond
        for name, cond in conds.items()
    }


def weighted(encoded: Sequence[Encoded]) -> tuple[Encoded, ...]:
    """With weights that add up to 1."""
    total = sum(each.weight for each in encoded)
    return tuple(replace(each, weight=each.weight / total) for each in encoded if each.weight)


def negatives_of(conditioning: Sequence[Sequence[Any]]) -> Negatives:
    """What a CONDITIONING says. ValueError for NaN, and for what belongs to a place in the picture."""
    entries = []
    for number, entry in enumerate(comfy.sampler_helpers.convert_cond(conditioning), start=1):
        text = entry.get("cross_attn")
        if text is None:
            raise ValueError(f"entry {number} of the negative conditioning has no encoded text: encode a prompt")
        if not bool(text.isfinite().all()):
            raise ValueError(
                f"entry {number} of the negative conditioning contains NaN or infinity: run the text encoder in float32"
            )
        found = sorted({node for name, node in OF_PLACES.items() if entry.get(name) is not None})
        if found:
            raise ValueError(
                f"entry {number} of the negative conditioning carries what attention cannot follow "
                f"({', '.join(found)}): link the conditioning from before those nodes"
            )
        if entry.get("strength", 1.0) < 0:
            raise ValueError(
                f"entry {number} of the negative conditioning has a strength of {entry['strength']:g}: expected 0 or "
                "more"
            )
        if text.shape[-2] and bool(text.any()) and entry.get("strength", 1.0):
            entries.append(entry)
    return Negatives(entries)
