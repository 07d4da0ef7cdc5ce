"""Which arithmetic a model is trained in, where the user leaves it open."""

import comfy.model_patcher

from ...training.loops.config import AUTOMATIC_PRECISION, precision_on


def precision_for(model: comfy.model_patcher.ModelPatcher, asked: str) -> str:
    """The precision that was asked for, or the one of the device that the model runs on."""
    return asked if asked != AUTOMATIC_PRECISION else precision_on(model.load_device.type)
