"""What a run begins with, where that is another adapter, and models that no run can begin on."""

import comfy.model_patcher

from ...training.adapters.methods import AdapterConfig
from ...training.formats.adapters import loaded_from
from ...training.formats.keys import FAMILIES
from ...training.formats.starting import Start, start_of
from .adapters import refuse_foreign, refuse_non_finite, weights_of, with_origin
from .families import family_of
from .windowed import windowed_adapters


def start_from(model: comfy.model_patcher.ModelPatcher, lora: dict | None, config: AdapterConfig) -> Start | None:
    """The adapter of a link as a run of ``config`` on ``model`` has it; None without one.

    ValueError for one of another family or method, or where the run does not train all of its layers.
    """
    if lora is None:
        return None
    adapter, family = with_origin(lora), family_of(model)
    refuse_foreign(model, adapter)
    refuse_non_finite(adapter)
    layout = "native" if family in FAMILIES else None
    loaded = loaded_from(adapter.file, layout, family=family, weights=weights_of(model))
    return start_of(loaded, config, adapter.name)


def refuse_windowed(model: comfy.model_patcher.ModelPatcher) -> None:
    """ValueError where an adapter acts at some noise levels only: it is not there when a block is computed again."""
    if windowed_adapters(model):
        raise ValueError(
            "an adapter on this model acts at some noise levels only, and training on top of it is not supported: "
            "link the model from before it, or let that adapter act at all noise levels"
        )
