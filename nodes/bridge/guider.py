"""A GUIDER over four predictions (training/guidance.py): with an adapter and without, with the prompt and without.

CFG's part of a rule is computed by ComfyUI's own function, in the model whose text is strengthened, so that whatever
nodes put on CFG (rescaling, perturbed attention, a scale by noise level) acts on it; what the adapter changes is added
last. A prediction whose weight is 0 at a noise level is not made there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.samplers
from torch import Tensor

from ...training.guidance import Guidance, combined
from ...training.windows import Window
from .families import latents_per_token
from .noise_levels import NoiseLevels, levels_of
from .pairs import Pair, Patcher, alone, pair_of, twin
from .windowed import missed
from .windowed import sentence as where

# By which nodes act on CFG: where one of them is there, its two predictions are made whatever their weights.
ON_CFG = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
)


NAMES = ("adapted(positive)", "adapted(negative)", "base(positive)", "base(negative)")


@dataclass(frozen=True)
class Windows:
    """Where each scale acts; None = at all noise levels. Beyond them it is 0."""

    style: Window | None = None
    text: Window | None = None

    @property
    def named(self) -> list[tuple[str, Window]]:
        """Those that there are."""
        return [(what, window) for what, window in (("style", self.style), ("text", self.text)) if window is not None]


def guider_of(
    model: Patcher, base: Patcher, guidance: Guidance, windows: Windows, warn: Callable[[str], None]
) -> "StyleGuider":
    """A guider without prompts yet. ValueError where the adapter cannot come and go; see :func:`.pairs.pair_of`.

    Where a rule needs one of the two models only, that model is sampled as it is.
    """
    needs_one = not guidance.added_style
    pair = alone(base if guidance.of_base else model) if needs_one else pair_of(model, base, warn)
    return StyleGuider(pair, guidance, windows, warn)


class StyleGuider(comfy.samplers.CFGGuider):
    """``cfg`` is 1 + the scale of the text, so that what changes a guider's scale changes that."""

    def __init__(self, pair: Pair, guidance: Guidance, windows: Windows, warn: Callable[[str], None]) -> None:
        super().__init__(pair.model)
        self._pair, self._guidance, self._windows, self._warn = pair, guidance, windows, warn
        self._judged: Tensor | None = None  # the sigmas of the last run of a sampler
        self._per_token = latents_per_token(pair.model) ** 2
        self.set_cfg(1 + guidance.text)

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
        seed: int | None = None,
    ) -> Tensor:
        """The guided x0 (b, c, h, w) for ComfyUI's x and sigma (b,)."""
        guidance = self._acting(x, timestep, model_options)
        weights, of_base = guidance.weights, guidance.of_base
        predict = partial(self._predict, x, timestep, model_options)
        if not (weights.base if of_base else weights.adapted) and not any(model_options.get(name) for name in ON_CFG):
            adapted = predict(False, weights.adapted, weights.adapted_null)
            return combined(weights, [*adapted, *predict(True, weights.base, weights.base_null)])
        other, _ = predict(not of_base, guidance.added_style, 0.0)

        def add_style(args: dict[str, Any]) -> Tensor:
            if other is None:
                return args["denoised"]
            change = other - args["cond_denoised"] if of_base else args["cond_denoised"] - other
            return args["denoised"] + guidance.added_style * change

        with self._side(of_base, model_options) as options:
            after = [*options.get("sampler_post_cfg_function", []), add_style]
            options = {**options, "sampler_post_cfg_function": after}
            positive, negative = self._prompts(of_base)
            return comfy.samplers.sampling_function(
                self.inner_model, x, timestep, negative, positive, 1 + guidance.text, options, seed
            )

    def _acting(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> Guidance:
        """The rule at a noise level."""
        scales = Guidance(self._guidance.style, self.cfg - 1, self._guidance.of_base)
        if self._windows == Windows():
            return scales
        levels = levels_of(self.inner_model.model_sampling)
        log_snr = levels.log_snr(timestep.flatten()[:1])
        tokens = max(1, x.shape[-1] * x.shape[-2] // self._per_token)
        self._judge(levels, tokens, model_options.get("transformer_options", {}).get("sample_sigmas"))

        def share(window: Window | None) -> float:
            return 1.0 if window is None else window.carried(tokens).strength(log_snr).item()

        return scales.times(share(self._windows.style), share(self._windows.text))

    def _judge(self, levels: NoiseLevels, tokens: int, sigmas: Tensor | None) -> None:
        """Says so where a scale acts at no step of a sampler; once for each run of it."""
        if sigmas is None or sigmas is self._judged:
            return
        self._judged = sigmas
        for what, window in self._windows.named:
            if reason := missed(window.carried(tokens), levels, sigmas, f" of the {what}"):
                self._warn(reason)

    def _predict(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], of_base: bool, prompt: float, null: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of one model, for the prompt and for the null prompt, in one batch; None for those of weight 0."""
        if not (prompt or null):
            return None, None
        positive, negative = self._prompts(of_base)
        wanted = [positive if prompt else None, negative if null else None]
        with self._side(of_base, model_options) as options:
            found = comfy.samplers.calc_cond_batch(self.inner_model, wanted, x, timestep, options)
        return found[0] if prompt else None, found[1] if null else None

    def _side(self, of_base: bool, model_options: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        return self._pair.as_base(model_options) if of_base else self._pair.as_adapted(model_options)

    def _prompts(self, of_base: bool) -> tuple[list[dict], list[dict]]:
        """As ComfyUI has prepared them."""
        found = self.conds["positive"], self.conds["negative"]
        if not of_base:
            return found
        positive, negative = ([{**each, "uuid": twin(each["uuid"])} for each in prompts] for prompts in found)
        return positive, negative

    @property
    def notice(self) -> str:
        """Why the style's scale may not do what is meant, "" where nothing says so."""
        return self._pair.notice if self._guidance.added_style else ""

    def sentence(self) -> str:
        """The weights where both scales act, how many predictions that is, where each scale acts, and the notice."""
        weights = Guidance(self._guidance.style, self.cfg - 1, self._guidance.of_base).weights
        acting = [f"{weight:+.4g} {name}" for name, weight in zip(NAMES, weights, strict=True) if weight]
        text = f"{' '.join(acting).removeprefix('+')}; {len(acting)} predictions a call"
        for what, window in self._windows.named:
            text += f"\nthe scale of the {what} {where(self.model_patcher, window)}"
        return f"{text}\n{self.notice}" if self.notice else text
