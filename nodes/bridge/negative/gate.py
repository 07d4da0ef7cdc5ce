"""Whether a call of a model is given the negative prompts, and what is known of them inside of it.

A gate wraps every call (APPLY_MODEL) of one clone. What it knows of a call travels in the transformer options of that
call, and what it knows of a run of a sampler (OUTER_SAMPLE) ends with the run, however it ends. Modules hold nothing.
"""

import logging
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ....training.attention_guidance import AttentionGuidance, Tokens
from ....training.windows import Window
from ..families import latents_per_token
from ..noise_levels import levels_of
from ..pairs import SIDE, twin
from .conds import Encoded, Negatives, weighted
from .reach import Layer, LayerForward, hidden, replaced

logger = logging.getLogger(__name__)

KEY = "stylewright.negative"
MARK = "stylewright.negative.texts"  # of transformer options: that negative texts are in a model that takes one node's
POSITIVE = 0  # of ``cond_or_uncond``, where nothing else tells


@dataclass(frozen=True)
class Inputs:
    """Arguments of ``apply_model``."""

    x: Tensor
    t: Tensor
    c_concat: Tensor | None
    text: Tensor | None  # c_crossattn
    control: Any
    options: Mapping[str, Any]  # transformer_options
    rest: Mapping[str, Any]  # y, guidance, attention_mask, …

    def with_options(self, **options: Any) -> "Inputs":
        return replace(self, options={**self.options, **options})


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a model that is given negative prompts."""

    key: str  # of it, in transformer options

    guidance: AttentionGuidance  # with the scale of this noise level
    negatives: tuple[Encoded, ...]  # those that count at it; their weights add up to 1
    layers: Collection[int] | None  # that act, counted from the input; None = all
    positive: frozenset | None  # ids of the positive prompts; None = unknown
    kept: dict[Any, list[Tokens]] | None  # negative keys and values by layer, for this run; None = none are kept
    # By layer, once it was given the negative tokens: whether they came to the attention that is ours.
    answered: dict[Any, bool] = field(default_factory=dict)

    def acts_in(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def guided(self, options: Mapping[str, Any]) -> list[bool]:
        """Of each equal part of the batch, as the options have it: whether it is of a positive prompt."""
        parts, ids = options.get("cond_or_uncond") or [POSITIVE], options.get("uuids") or []
        if self.positive and len(ids) == len(parts):
            return [each in self.positive for each in ids]
        return [each == POSITIVE for each in parts]


Run = Callable[[Callable[[Inputs], Tensor], Inputs, Call], Tensor]


@dataclass
class _Sampling:
    """What is known for one run of a sampler."""

    positive: frozenset | None = None
    began: Tensor | None = None  # t of the first call, for which nothing can have been cached
    called: bool = False  # with negative prompts
    acted: bool = False
    encoded: dict[Any, list] = field(default_factory=dict)  # by device and size of the latents
    kept: dict[Any, dict[Any, list[Tokens]]] = field(default_factory=dict)  # by which negatives count


class Gate:
    """Decides for every call, and hands those on that are to be given negative prompts."""

    def __init__(
        self,
        negatives: Negatives,
        guidance: AttentionGuidance,
        window: Window | None,
        layers: Collection[int] | None,
    ) -> None:
        self.key = f"{KEY}/{uuid.uuid4()}"  # of this gate's call, in transformer options
        self._negatives, self._guidance, self._window, self._layers = negatives, guidance, window, layers
        self._sampling: _Sampling | None = None
        self._inside: ContextVar[bool] = ContextVar(self.key, default=False)
        self._per_token = 1
        self._run: Run | None = None
        self._reached: Sequence[Layer] = ()
        self._before: Sequence[Layer] = ()

    def open(
        self, model: comfy.model_patcher.ModelPatcher, run: Run, layers: Sequence[Layer], before: Sequence[Layer] = ()
    ) -> None:
        """Puts the gate on a clone. ``run`` makes a call with negative prompts, by the function that it is given.

        layers: the attentions to text, in their order. before: what is given the negative prompts before them.
        ValueError where layers that are to act are not among them.
        """
        if self._layers and max(self._layers) >= len(layers):
            raise ValueError(
                f"this model has {len(layers)} attentions to text, 0 to {len(layers) - 1}: layer {max(self._layers)} "
                "is not one"
            )
        self._run, self._reached, self._before = run, layers, before
        self._per_token = latents_per_token(model) ** 2
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, self.key, self._sample)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self.key, self._apply)

    def _sample(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        before, self._sampling = self._sampling, _Sampling(_positive(executor.class_obj))
        try:
            answer = executor(*args, **kwargs)
            if self._sampling.called and not self._sampling.acted:
                raise hidden([layer.path for layer in self._reached])
            if not self._sampling.called:
                logger.warning(
                    "the negative prompt acted in none of the steps: look at its window of noise levels, and at ranges "
                    "of steps that it brought along"
                )
            return answer
        finally:
            self._sampling = before

    def _apply(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = {},
        **rest: Any,
    ) -> Tensor:
        def go(inputs: Inputs) -> Tensor:
            return executor(
                inputs.x, inputs.t, inputs.c_concat, inputs.text, inputs.control, inputs.options, **inputs.rest
            )

        inputs = Inputs(x, t, c_concat, c_crossattn, control, transformer_options, rest)
        if self._sampling is not None and self._sampling.began is None:
            self._sampling.began = t
        call = None if self._inside.get() else self._call(executor.class_obj, inputs)
        if call is None:
            return go(inputs)
        assert self._run is not None, "the gate was opened"
        inside = self._inside.set(True)
        try:
            answer = self._run(go, inputs.with_options(**{self.key: call}), call)
        finally:
            self._inside.reset(inside)
        self._check(executor.class_obj, inputs, call)
        return answer

    def _check(self, model: Any, inputs: Inputs, call: Call) -> None:
        """ValueError where another node answers for layers. Asked once a run: some nodes skip layers in later calls."""
        met = [*self._reached, *self._before]
        half = [layer.path for layer in met if call.answered.get(layer.key) is False]
        if half:
            raise hidden(half)
        sampling = self._sampling or _Sampling()
        acted = any(call.acts_in(number) and call.answered.get(each.key) for number, each in enumerate(self._reached))
        if not sampling.called:
            missing = [layer for layer in met if layer.key not in call.answered]
            others = replaced(missing, model.diffusion_model, model.current_patcher, inputs.options)
            began = sampling.began is None or torch.equal(sampling.began, inputs.t)
            if others or (began and not acted):
                raise hidden([layer.path for layer in others or missing])
        sampling.called, sampling.acted = True, sampling.acted or acted

    def _call(self, model: Any, inputs: Inputs) -> Call | None:
        """None where the model is to answer as it would without us."""
        strength = self._strength(model, inputs)
        negatives = self._counting(model, inputs) if strength else ()
        sampling = self._sampling
        call = Call(
            self.key,
            replace(self._guidance, scale=self._guidance.scale * strength) if strength != 1 else self._guidance,
            weighted(negatives),
            self._layers,
            sampling.positive if sampling else None,
            None,
        )
        if not call.negatives or not any(call.guided(inputs.options)):
            return None
        _check_widths(call.negatives, inputs.text)
        if sampling is None or not _weights_stay(model, inputs.options):
            return call
        which = (inputs.x.device, inputs.options.get(SIDE), *(id(each.conds) for each in call.negatives))
        return replace(call, kept=sampling.kept.setdefault(which, {}))

    def _strength(self, model: Any, inputs: Inputs) -> float:
        if self._window is None:
            return 1.0
        size = max(1, inputs.x.shape[-1] * inputs.x.shape[-2] // self._per_token)
        levels = levels_of(model.model_sampling).log_snr(inputs.t)
        strengths = set(self._window.carried(size).strength(levels).tolist())  # waits for the device, once a call
        if len(strengths) > 1:
            raise ValueError(
                "the rows of a batch have different noise levels, and the window of the negative prompt holds some of "
                "them: sample with one noise level at a time"
            )
        return strengths.pop()

    def _counting(self, model: Any, inputs: Inputs) -> list[Encoded]:
        """The negatives whose range this noise level is in."""
        found, x = self._sampling.encoded if self._sampling else {}, inputs.x
        size = (x.device, x.shape[1:])
        if size not in found:
            found[size] = self._negatives.encode(model, x)
        if all(start is None and end is None for _, start, end in found[size]):
            return [each for each, _, _ in found[size]]
        sigma = float(inputs.t[0])  # as ComfyUI asks for ranges of conditioning
        return [
            each
            for each, start, end in found[size]
            if (start is None or sigma <= start) and (end is None or sigma >= end)
        ]


def check_single(options: Mapping[str, Any]) -> None:
    """ValueError where another node's negative prompt is in this call, too."""
    if options.get(MARK):
        raise ValueError(
            "two negative prompts act on this model at the same noise level: join them with Conditioning (Combine), or "
            "give them windows that do not overlap"
        )


def _positive(guider: Any) -> frozenset | None:
    """Ids of a guider's positive prompts. Their place in a batch does not tell: DualCFGGuider's first is negative."""
    conds = guider.conds.get("positive") if guider is not None else None
    return frozenset(each for cond in conds for each in (cond["uuid"], twin(cond["uuid"]))) if conds else None


def _weights_stay(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether a layer is the same in every call of a run: no hooks, no other function that may change it."""
    wrappers = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    patcher = model.current_patcher
    return (
        not torch.is_grad_enabled()
        and all(str(key).startswith(KEY) for key in wrappers)
        and patcher is not None
        and not patcher.hook_patches
        and not any(
            path.startswith("diffusion_model") and not isinstance(found, LayerForward)
            for path, found in patcher.object_patches.items()
        )
    )


def _check_widths(negatives: tuple[Encoded, ...], text: Tensor | None) -> None:
    for each in negatives:
        if text is not None and each.text.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"the negative prompt is encoded {each.text.shape[-1]} wide and the positive one "
                f"{text.shape[-1]}: encode both with the text encoder of this model"
            )
