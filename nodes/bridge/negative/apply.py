"""A model and a negative prompt, by the class of the model."""

from collections.abc import Collection, Sequence
from typing import Any

import comfy.model_patcher

from ....training.attention_guidance import AttentionGuidance
from ....training.windows import Window
from ..noise_levels import noise_levels
from ..sound import check_fits
from . import pixart, separate, unet
from .conds import negatives_of
from .gate import Gate
from .joint import JOINT
from .refined import REFINED

# Class of a diffusion model -> attach(model, negatives, guidance, gate). A class counts for what derives from it,
# unless that has a line of its own; None = none of ComfyUI's hooks reaches it.
ATTACH: dict[str, Any] = {
    "UNetModel": unet.attach,
    "PixArtMS": pixart.attach,
    "WanModel": separate.attach_to(separate.WAN),
    "GeneralDIT": separate.attach_to(separate.COSMOS),
    "MiniTrainDIT": separate.attach_to(separate.COSMOS_PREDICT2),
    "LTXVModel": separate.attach_to(separate.LTX),
    "LTXAVModel": None,  # two texts, which are mixed with each other before the layers see them
    **JOINT,
    **REFINED,
}


class Unsupported(ValueError):
    """A model whose attention to text no hook of ComfyUI reaches."""


def apply(
    model: comfy.model_patcher.ModelPatcher,
    negative: Sequence[Sequence[Any]],
    guidance: AttentionGuidance,
    window: Window | None = None,
    layers: Collection[int] | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone that is kept away from ``negative``, a CONDITIONING; an empty one and a scale of 0 change nothing.

    ``layers``: attentions to text that act, counted from the model's input; None = all. ValueError for a negative that
    this model cannot take, :class:`Unsupported` for a family without a hook.
    """
    negatives, attach, clone = negatives_of(negative), _attach_of(model), model.clone()
    check_fits(model, {"the negative prompt": negative})
    if window is not None:
        noise_levels(model)  # noise that has no log_snr is refused here, not in sampling
    if len(negatives) and guidance.scale:
        attach(clone, negatives, guidance, Gate(negatives, guidance, window, layers))
    return clone


def _attach_of(model: comfy.model_patcher.ModelPatcher) -> Any:
    kinds = [kind.__name__ for kind in type(model.model.diffusion_model).__mro__]
    known = [kind for kind in kinds if kind in ATTACH]
    if not known or ATTACH[known[0]] is None:
        raise Unsupported(
            f"{kinds[0]}: no hook of ComfyUI reaches this model's attention to text, so a negative prompt would do "
            f"nothing. It works on {', '.join(name for name, attach in ATTACH.items() if attach)}"
        )
    return ATTACH[known[0]]
