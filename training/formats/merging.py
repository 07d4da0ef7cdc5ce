"""One student of two: weights between theirs, w theta_A + (1 - w) theta_B (SwiftBrush v2, arXiv 2408.14176).

Of two adapters the change that they make is merged, and not their factors: for products scale B A with their ranks one
after the other, [w s B, (1 - w) s' B'] [A; A'] is the mean of the changes exactly. Where one student has all weights,
as the paper's first has, the other's are those of the base model with its change, and all weights come out.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ..one_step_presets import told_apart
from .contents import AdapterFile, read_about, read_adapter, read_outline
from .layers import Layer
from .metadata import FULL, LAYERS_KEY, LAYOUT_KEY, NORM_KEY, STYLE_KEY, AdapterMetadata
from .resizing import Cut, as_lora, require_finite, resize_layers, rewritten, write_file
from .whole import is_whole, load_whole, save_whole

MERGED = "merged"  # in the metadata: of what
ALIKE = ("family", "process", "prediction")  # of two students, and how they are called


# All weights of a base model with the change of the adapter in this file.
Changed = Callable[[Path], Mapping[str, Tensor]]


def merge_students(
    first: Path,
    second: Path,
    target: Path,
    weight: float,
    cut: Cut | None = None,  # lower ranks, for of adapters the sum of both would be exact, and as large as both
    *,
    changed: Changed | None = None,  # for one student with all weights and one adapter
) -> str:
    """Writes the student between two, ``weight`` of the first and the rest of the second, and says how large it is.

    ValueError, and nothing written, for files that are no students, or that are called differently.
    """
    whole = [is_whole(path) for path in (first, second)]
    if changed is not None and len(set(whole)) == 1:
        both = "have all weights" if whole[0] else "are adapters"
        raise ValueError(f"Got a model, and both students {both}, which need none: leave --model out.")
    if any(whole):
        if cut is not None:
            raise ValueError("Got a rank, and what comes out has all weights, with none to lower: leave --rank out.")
        return f"{_merge_whole(first, second, target, weight, changed)} tensors, all weights"
    merged = merged_files(read_adapter(first), read_adapter(second), weight)
    if cut is not None:
        small = resize_layers(merged.layers, cut)
        merged = rewritten(merged, small.layers, {"resized": f"by {cut.by} {cut.value:g}: {small.summary()}"})
    write_file(target, merged)
    ranks = sorted({layer.rank or 0 for layer in merged.layers.values()})
    return f"{len(merged.layers)} layers of rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}"


@torch.no_grad()
def _merge_whole(first: Path, second: Path, target: Path, weight: float, changed: Changed | None) -> int:
    """Of two students, one of which at least has all weights, tensor by tensor in float32. How many."""
    require_weight(weight)
    names = names_apart(first, second)
    about = merged_about(read_about(first), read_about(second), names, weight)
    for path in (first, second):
        _require_weights(path, changed)
    one, other = (load_whole(path) if changed is None or is_whole(path) else changed(path) for path in (first, second))
    stored = one if is_whole(first) else other  # in the types to write
    for name in one.keys() | other.keys():
        if name not in one or name not in other or one[name].shape != other[name].shape:
            with_model = "" if changed is None else ", the one that is given included"
            raise ValueError(f"{name} is not of one size in {names[0]} and {names[1]}: expected one model{with_model}")
    kept = {}
    for name in one:  # in float32 one after the other, for all at once may be twice the file
        between = torch.lerp(other[name].float(), one[name].float(), weight)
        if not between.isfinite().all():
            raise ValueError(f"{name} is not finite between {names[0]} and {names[1]}: one of them is damaged")
        kept[name] = between.to(stored[name].dtype)
    save_whole(target, kept, replace(about, method=FULL), {MERGED: mixture(weight, names)})
    return len(kept)


def _require_weights(path: Path, changed: Changed | None) -> None:
    """ValueError for an adapter without the model that it is on, or that has no weights there."""
    if is_whole(path):
        return
    outline = read_outline(path)
    if outline.unmergeable:
        raise ValueError(f"{path} acts by what comes into its layers, and is no change of weights: it has no mean")
    if changed is None:
        base = outline.about.base_model if outline.about else ""
        raise ValueError(
            f"{path} is an adapter, a change of its model's weights, and the other student has all weights: what is "
            "between them takes the model's, too. Give the model that the adapter was distilled from with --model"
            + (f" (its file says {base})" if base else "")
        )


def merged_files(first: AdapterFile, second: AdapterFile, weight: float) -> AdapterFile:
    """The same of files that are open already."""
    require_weight(weight)
    names = names_apart(first.path, second.path)
    about = merged_about(first.about, second.about, names, weight)
    for file in (first, second):
        if file.unknown:
            raise ValueError(f"{file.path} has tensors that we do not understand, for example {file.unknown[0]}")
        require_finite(file.layers)
    layers = merged_layers(first.layers, second.layers, weight)
    made = replace(first, about=about, header=_header(first, second))
    return rewritten(made, layers, {MERGED: mixture(weight, names)})


def mixture(weight: float, names: tuple[str, str]) -> str:
    return f"{weight:g} of {names[0]} and {1 - weight:g} of {names[1]}"


def names_apart(one: Path, other: Path) -> tuple[str, str]:
    """The names of two files, with as many of their folders as tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in (one, other)]
    for count in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(each[-count:]) for each in parts]
        if ends[0] != ends[1]:
            return ends[0], ends[1]
    return one.name, other.name  # one file


def _header(first: AdapterFile, second: AdapterFile) -> dict[str, str]:
    """What the first's says of how it is written; of how it came to be, nothing is true of both."""
    kept = {key: first.header[key] for key in (STYLE_KEY, LAYOUT_KEY, NORM_KEY) if key in first.header}
    trained = [json.loads(file.header.get(LAYERS_KEY, "[]")) for file in (first, second)]
    names = dict.fromkeys([*trained[0], *trained[1]])
    return {**kept, LAYERS_KEY: json.dumps(list(names))} if names else kept


def require_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the first student is {weight:g}: expected a share from 0 to 1")


@torch.no_grad()
def merged_layers(first: Mapping[str, Layer], second: Mapping[str, Layer], weight: float) -> dict[str, Layer]:
    """LoRAs with a scale of 1. ValueError for layers of different sizes, or names of different layouts."""
    if not first.keys() & second.keys():
        raise ValueError(
            f"the students have no layer in common: the one has {next(iter(first))} and the other "
            f"{next(iter(second))}. Write both in one style before (stylewright convert --style)"
        )
    parts: dict[str, list[Layer]] = {}
    for layers, share in ((first, weight), (second, 1 - weight)):
        for name, layer in layers.items() if share else ():
            lora = as_lora(name, layer)
            parts.setdefault(name, []).append(replace(lora, scale=lora.scale * share))
    return {name: _side_by_side(name, layers) for name, layers in parts.items()}


def _side_by_side(name: str, layers: list[Layer]) -> Layer:
    shapes = {(len(layer.tensors["B"]), *layer.tensors["A"].shape[1:]) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"the layer {name} has the sizes {' and '.join(map(str, sorted(shapes)))}: expected one model")
    inner = torch.cat([layer.tensors["A"] for layer in layers])
    outer = torch.cat([layer.scale * layer.tensors["B"].float() for layer in layers], dim=1)
    return Layer("lora", {"A": inner, "B": outer.to(inner.dtype)})


def merged_about(
    first: AdapterMetadata | None, second: AdapterMetadata | None, names: tuple[str, str], weight: float
) -> AdapterMetadata:
    """What is true of both students, and the size of the weightier one. ValueError naming what they differ in."""
    for about, name in zip((first, second), names, strict=True):
        if about is None or not about.one_step:
            raise ValueError(f"{name} does not say that it is a one-step student: only those are merged")
    assert first is not None and second is not None
    for what in ALIKE:
        if (one := getattr(first, what)) != (other := getattr(second, what)):
            _refuse(what, one, other, names)
    if differing := told_apart(first.one_step, second.one_step):
        _refuse(f"the student's {differing[0]}", *differing[1:], names)
    same = {field: getattr(first, field) for field in COMMON if getattr(first, field) == getattr(second, field)}
    same["resolution"] = (first if weight >= 0.5 else second).resolution or first.resolution or second.resolution
    kept = {field: getattr(first, field) for field in (*ALIKE, "one_step", "unet_layers")}
    return AdapterMetadata(method="lora", rank=1, title="One-step student", **kept, **same)


COMMON = ("base_model", "style_phrase", "trigger", "targets")


def _refuse(what: str, one: str, other: str, names: tuple[str, str]) -> NoReturn:
    raise ValueError(f"{what} is {one} in {names[0]} and {other} in {names[1]}: such students cannot be merged")
