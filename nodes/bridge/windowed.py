"""An adapter that is no patch of weights: one that acts at some noise levels only, or by the input of its layers.

For every call of the model its noise level decides how strongly the adapter acts. Where it does, hooks add it to the
layers' outputs (:mod:`.terms`) for the time of that call; where it does not, there are no hooks, and the model answers
as if there were no adapter, bit for bit. In training, blocks that are computed again for their gradients get the same
hooks again. No weight is patched. Of several such adapters each is added to what those
before it, in the order of their loaders, have left.
"""

import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ...training.adapters.text_tokens import told_of_text
from ...training.data.captions import listed
from ...training.gradients import entered_again
from ...training.windows import Window
from .families import latents_per_token
from .noise_levels import NoiseLevels, levels_of, noise_levels
from .patch_terms import Place, Site, Unfit, Unpatched, place_of_patch, term_of
from .terms import Term, is_convolution

KEY = "stylewright.windowed"


class WindowedAdapter:
    """The wrapper around every call of a model (APPLY_MODEL) that brings an adapter in. Holds nothing of a call."""

    def __init__(
        self, window: Window | None, terms: list[tuple[Place, Term]], *, per_token: int, warn: Callable[[str], None]
    ) -> None:
        """``window``: None = at all noise levels, also of a model whose noise has no log_snr."""
        self.window = window
        self._terms = terms
        self._per_token = per_token  # positions of a latent to an image token
        self._warn = warn
        self._sampling: Any = None  # whose noise levels these are
        self._levels: NoiseLevels | None = None
        self._judged: Tensor | None = None  # the sigmas of the last run of a sampler
        self._all_reached = False

    def __call__(self, executor: WrapperExecutor, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.window is None:
            return self._run(executor, 1.0, x, t, *args, **kwargs)
        levels = self._levels_of(executor.class_obj)
        window = self.window.carried(max(1, x.shape[-1] * x.shape[-2] // self._per_token))
        self._judge(window, levels, _options(args, kwargs).get("sample_sigmas"))
        rows = window.strength(levels.log_snr(t))
        values = rows.tolist()  # waits for the device, once a call
        if not any(values):
            return executor(x, t, *args, **kwargs)
        return self._run(executor, values[0] if len(set(values)) == 1 else rows, x, t, *args, **kwargs)

    @property
    def terms(self) -> list[tuple[Place, Term]]:
        return self._terms

    def described(self) -> list[Any]:
        """What tells it from others: its window, the places of its terms, and their numbers."""
        return [repr(self.window), [[repr(place), repr(term), term] for place, term in self._terms]]

    def _run(self, executor: WrapperExecutor, strengths: float | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hooked = partial(_hooked, executor.class_obj, self._terms, strengths)
        with hooked() as reached, entered_again(hooked):
            answer = executor(*args, **kwargs)
        self._check(reached)
        return answer

    def _levels_of(self, model: Any) -> NoiseLevels:
        if self._levels is None or self._sampling is not model.model_sampling:
            self._sampling, self._levels = model.model_sampling, levels_of(model.model_sampling)
        return self._levels

    def _judge(self, window: Window, levels: NoiseLevels, sigmas: Tensor | None) -> None:
        """Says so where no step of a sampler falls into the window; once for each run of it."""
        if sigmas is None or sigmas is self._judged or comfy.model_management.in_training:
            return
        self._judged = sigmas
        if reason := missed(window, levels, sigmas):
            self._warn(reason)

    def _check(self, reached: set[str]) -> None:
        missing = [place.layer for place, _ in self._terms if place.layer not in reached]
        if missing and not self._all_reached:
            self._warn(f"{len(missing)} layers are not run as modules, so it does nothing there: {listed(missing)}")
        self._all_reached = True  # or it has been said


def missed(window: Window, levels: NoiseLevels, sigmas: Tensor, of: str = "") -> str:
    """Says that no step of a sampler falls into the window, "" where one does. ``of``: whose window it is."""
    visited = levels.log_snr(sigmas[:-1] if len(sigmas) > 1 else sigmas)
    if window.strength(visited).any():
        return ""
    return f"no step of the sampler is in the window{of}: they go from log_snr {visited[0]:.2f} to {visited[-1]:.2f}"


def act_within(
    model: comfy.model_patcher.ModelPatcher,
    patches: Mapping[str | tuple, tuple[object, float]],
    window: Window,
    warn: Callable[[str], None],
) -> None:
    """Puts patches, with a strength each, on a clone of ours, to act in ``window``. ValueError names what cannot.

    ``warn`` takes what turns out in sampling: that no step falls into the window, or that layers are not reached.
    """
    levels_of(model.get_model_object("model_sampling"))  # noise that has no log_snr is refused here, not in sampling
    try:
        terms = terms_of(model, patches)
    except Unfit as error:
        raise ValueError(f"this adapter can only act at all noise levels: {error}. Set window to all") from error
    put_terms(model, terms, window, warn)


def terms_of(
    model: comfy.model_patcher.ModelPatcher, patches: Mapping[str | tuple, tuple[object, float]]
) -> list[tuple[Place, Term]]:
    """Patches, with a strength each, as terms for the layers of a model. :class:`Unfit` names what has no such form."""
    base, dtype = Unpatched(model), model.model.get_dtype_inference()
    terms, unfit = [], []
    for key, (patch, strength) in patches.items():
        try:
            place = place_of_patch(key)
            site = Site(place, model.model.get_submodule(place.layer), strength, base, dtype)
            terms.append((place, term_of(site, patch)))
        except Unfit as error:
            unfit.append(str(error))
    if unfit:
        raise Unfit(f"{len(unfit)} of its parts do more than add to what a layer gives out ({'; '.join(unfit[:3])})")
    return terms


def put_terms(
    model: comfy.model_patcher.ModelPatcher,
    terms: list[tuple[Place, Term]],
    window: Window | None,
    warn: Callable[[str], None],
) -> str:
    """Puts terms on a clone of ours, to act in ``window``, or at all noise levels. They are loaded and moved with it.

    ``warn`` takes what turns out in sampling, as above. Gives the key of the wrapper that adds them.
    """
    own = f"{KEY}/{uuid.uuid4()}"
    adapter = WindowedAdapter(window, terms, per_token=latents_per_token(model) ** 2, warn=warn)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, own, adapter)
    tensors = nn.ModuleList(term for _, term in terms)
    patcher = comfy.model_patcher.ModelPatcher(tensors, model.load_device, model.offload_device)
    model.set_additional_models(own, [patcher])
    return own


def sentence(model: comfy.model_patcher.ModelPatcher, window: Window) -> str:
    """Where it acts, in the model's own range; says so if the model never gets there."""
    lowest, highest = noise_levels(model).log_snr_range
    low, high = max(window.low, lowest), min(window.high, highest)
    ends = [f"from {low:.4g}" if low > -math.inf else "", f"below {high:.4g}" if high < math.inf else ""]
    text = f"acts at log_snr {' '.join(filter(None, ends)) or 'of any value'}"
    if window.reference_tokens is not None:
        text += f" for pictures of {window.reference_tokens} image tokens, and carried to the size of yours"
    elif not window.reaches(lowest, highest):
        return (
            f"acts nowhere: this model knows log_snr from {lowest:.4g} to {highest:.4g}, and the window is from "
            f"{window.low:.4g} to {window.high:.4g}"
        )
    text += f", coming and going over {window.edge:g} at its ends" if window.edge else ""
    return text + (f", elsewhere with {window.outside:g} of the strength" if window.outside else "")


def windowed_adapters(model: comfy.model_patcher.ModelPatcher) -> list[WindowedAdapter]:
    """Those on a model, in the order in which they were put there."""
    wrappers = model.wrappers.get(WrappersMP.APPLY_MODEL, {})
    return [each for key, found in wrappers.items() if str(key).startswith(KEY) for each in found]


def _options(args: tuple, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer options among the arguments of ``apply_model`` after x and t."""
    return kwargs["transformer_options"] if "transformer_options" in kwargs else args[3] if len(args) > 3 else {}


def _outside(layer: Any) -> Any:
    """Where a term goes on a layer that an adapter in training is around: on the outside, if that will be part of the
    layer's weights; inside of one that will be a term, too, and then comes after this one.
    """
    return layer.get_base_layer() if getattr(layer, "acts_by_input", False) else layer


def _bare(layer: Any) -> nn.Module:
    """The layer without an adapter in training around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


@contextmanager
def _hooked(model: nn.Module, terms: list[tuple[Place, Term]], strengths: float | Tensor) -> Iterator[set[str]]:
    """Inside, the terms are part of the model. Gives the set that the names of the layers that ran are put in."""
    reached: set[str] = set()
    with ExitStack() as stack:
        if any(term.reads_text for _, term in terms):
            stack.enter_context(told_of_text(model.get_submodule("diffusion_model")))
        for place, term in terms:
            layer, hook = _outside(model.get_submodule(place.layer)), _Hook(place, term, strengths, reached)
            # What the last adapter does to the input, those before it see: as a later patch is of the weight so far.
            stack.callback(layer.register_forward_pre_hook(hook.before, prepend=True).remove)
            stack.callback(layer.register_forward_hook(hook.after).remove)
        yield reached


class _Hook:
    """One term at its layer, for one call of the model."""

    def __init__(self, place: Place, term: Term, strengths: float | Tensor, reached: set[str]) -> None:
        self._place, self._term, self._strengths, self._reached = place, term, strengths, reached
        self._input: Tensor | None = None

    def before(self, layer: nn.Module, args: tuple) -> tuple | None:
        self._input = args[0]
        added = self._term.before(_bare(layer), args[0])
        return None if added is None else (self._add(args[0], added), *args[1:])

    def after(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        self._reached.add(self._place.layer)
        layer, x, self._input = _bare(layer), self._input, None
        assert x is not None, "the layer ran"
        if self._place.rows is None:
            added = self._term.after(layer, x, output)
            return None if added is None else self._add(output, added)
        part = output.clone()
        rows = part.narrow(1 if is_convolution(layer) else -1, *self._place.rows)
        added = self._term.after(layer, x, rows)
        if added is not None:
            rows.copy_(self._add(rows, added))
        return part

    def _add(self, to: Tensor, added: Tensor) -> Tensor:
        if not isinstance(self._strengths, Tensor):
            return torch.add(to, added, alpha=self._strengths)
        rows = self._strengths.to(to.device, to.dtype)
        if to.shape[0] % len(rows):
            raise ValueError(
                f"the rows of a batch have different noise levels, and the layer {self._place.layer} works on "
                f"{to.shape[0]} rows for the {len(rows)} of the batch: sample with one noise level at a time"
            )
        rows = rows.repeat_interleave(to.shape[0] // len(rows))
        return to + rows.reshape(-1, *[1] * (to.ndim - 1)) * added
