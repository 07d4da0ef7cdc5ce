"""A model with an adapter and without it, on the same weights: which of them it is may change from call to call.

Two MODELs of one loader share their weights, and ComfyUI patches those when it loads a model: called in turn, it would
patch all of them twice a step. Here the patches that the two have in common stay in the weights. Those that only one
of them has become terms beside its layers (:mod:`.windowed`), added for the time of a call. Adapters that are wrappers
or injections already (those with a window, StyleInject, ComfyUI's bypass loader) are left out where they do not belong.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import PatcherInjection, WrappersMP

from .patch_terms import Place, Unfit
from .terms import Term
from .windowed import KEY, put_terms, terms_of

Patcher = comfy.model_patcher.ModelPatcher
SIDE = "stylewright.side"  # in transformer options: whose calls these are, for what keeps anything from call to call
Injections = Mapping[str, list[PatcherInjection]]


@dataclass(frozen=True)
class Side:
    """What belongs to one of the two only."""

    wrappers: frozenset[str] = frozenset()  # keys, of calls of the model
    injections: Injections = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """``model`` is what is loaded; it has the wrappers of both sides, and the injections of the adapted one."""

    model: Patcher
    adapted: Side
    base: Side

    @property
    def differ(self) -> bool:
        return any(side.wrappers or side.injections for side in (self.adapted, self.base))

    @property
    def notice(self) -> str:
        """What is odd about the two, "" where nothing is."""
        if not self.differ:
            return "model and base are the same: there is no adapter whose style could be strengthened"
        if not (self.adapted.wrappers or self.adapted.injections):
            return "base has an adapter and model has none: if that is not meant, link them the other way round"
        return ""

    @contextmanager
    def as_adapted(self, model_options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Inside, calls with the options that it gives are of the adapted model."""
        yield _options(model_options, "adapted", self.base.wrappers)

    @contextmanager
    def as_base(self, model_options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Inside, calls with the options that it gives are of the base, and no others may be made."""
        _eject(self.model, self.adapted.injections)
        try:
            _inject(self.model, self.base.injections)
            yield _options(model_options, "base", self.adapted.wrappers)
        finally:
            _eject(self.model, self.base.injections)
            _inject(self.model, self.adapted.injections)


def twin(prompt: uuid.UUID) -> uuid.UUID:
    """The id of a prompt in calls of the base: what keeps answers by their prompts must not mix the two."""
    return uuid.uuid5(prompt, SIDE)


def alone(model: Patcher) -> Pair:
    """Of a model that is the adapted one and the base at once."""
    return Pair(model, Side(), Side())


def pair_of(model: Patcher, base: Patcher, warn: Callable[[str], None]) -> Pair:
    """Of two MODELs that share their weights. What is no adapter is ``model``'s for both.

    ``warn`` takes what turns out while sampling. ValueError where they share no weights, or where they differ by
    something that cannot come and go.
    """
    if not model.is_clone(base):
        raise ValueError(
            "model and base are two models in memory: link base to what the adapter's loader gets as its model, and "
            "model to what it gives"
        )
    shared = model.clone()
    common = {key: _common(patches, base.patches.get(key, [])) for key, patches in model.patches.items()}
    shared.patches = {key: patches for key, patches in common.items() if patches}
    shared.patches_uuid = base.patches_uuid if shared.patches == base.patches else uuid.uuid4()
    for key, models in base.additional_models.items():
        if key not in shared.additional_models:
            shared.set_additional_models(key, [each.clone() for each in models])
    sides = [Side(_wrappers(one, other), _injections(one, other)) for one, other in ((model, base), (base, model))]
    for key in sides[1].wrappers:
        for wrapper in base.wrappers[WrappersMP.APPLY_MODEL][key]:
            shared.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, wrapper)
    patched = [_put(shared, _terms(shared, each), warn) for each in (model, base)]
    adapted, base_side = (
        Side(side.wrappers | keys, side.injections) for side, keys in zip(sides, patched, strict=True)
    )
    return Pair(shared, adapted, base_side)


def _common(patches: list[tuple], others: list[tuple]) -> list[tuple]:
    """Of a weight: those with which both begin."""
    both = []
    for one, other in zip(patches, others, strict=False):
        if one is not other:
            break
        both.append(one)
    return both


def _terms(shared: Patcher, model: Patcher) -> list[tuple[Place, Term]]:
    """The further patches of a model as terms, each for the weight that those before it leave."""
    further = {key: patches[len(shared.patches.get(key, [])) :] for key, patches in model.patches.items()}
    terms, stage = [], shared.clone()
    for number in range(max(map(len, further.values()), default=0)):
        entries = {key: patches[number] for key, patches in further.items() if len(patches) > number}
        try:
            terms += terms_of(stage, dict(_named(key, entry) for key, entry in entries.items() if entry[0]))
        except Unfit as error:
            raise ValueError(f"this adapter cannot come and go while sampling: {error}") from error
        for key, entry in entries.items():
            stage.patches[key] = [*stage.patches.get(key, []), entry]
    return terms


def _named(key: str, entry: tuple) -> tuple[str | tuple, tuple[object, float]]:
    """A patch as ``add_patches`` got it: (key, (patch, strength))."""
    strength, patch, of_weight, offset, function = entry
    if of_weight != 1.0:
        raise Unfit(f"{key} is merged with another model's")
    name = key if offset is None and function is None else (key, offset, function)
    return name, (patch, strength)


def _put(shared: Patcher, terms: list[tuple[Place, Term]], warn: Callable[[str], None]) -> frozenset[str]:
    """Puts terms before the adapters that are wrappers already: they stand for patches. Gives their key."""
    if not terms:
        return frozenset()
    key = put_terms(shared, terms, None, warn)
    wrappers = shared.wrappers[WrappersMP.APPLY_MODEL]
    shared.wrappers[WrappersMP.APPLY_MODEL] = {key: wrappers[key], **wrappers}
    return frozenset({key})


def _wrappers(model: Patcher, other: Patcher) -> frozenset[str]:
    """Keys of the adapters in the form of wrappers that the other has not."""
    one, two = (each.wrappers.get(WrappersMP.APPLY_MODEL, {}) for each in (model, other))
    return frozenset(str(key) for key in one if str(key).startswith(KEY) and key not in two)


def _injections(model: Patcher, other: Patcher) -> dict[str, list[PatcherInjection]]:
    return {key: list(found) for key, found in model.injections.items() if other.injections.get(key) != found}


def _options(model_options: dict[str, Any], side: str, missing: frozenset[str]) -> dict[str, Any]:
    """The options of a side: without the wrappers that have these keys."""
    transformer = {**model_options.get("transformer_options", {}), SIDE: side}
    if missing:
        wrappers = transformer["wrappers"]
        kept = {key: found for key, found in wrappers[WrappersMP.APPLY_MODEL].items() if key not in missing}
        transformer["wrappers"] = {**wrappers, WrappersMP.APPLY_MODEL: kept}
    return {**model_options, "transformer_options": transformer}


def _eject(model: Patcher, injections: Injections) -> None:
    for each in reversed([each for found in injections.values() for each in found]):
        each.eject(model)


def _inject(model: Patcher, injections: Injections) -> None:
    for each in (each for found in injections.values() for each in found):
        each.inject(model)
