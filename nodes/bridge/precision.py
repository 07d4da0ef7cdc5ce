"""Which arithmetic a model is trained in, where the user leaves it open."""

import comfy.model_patcher

AUTOMATIC_PRECISION = "automatic"
# Devices with matrix products in bfloat16. A CPU has them seldom, and then for large products only.
WITH_BFLOAT16 = ("cuda", "xpu")


def precision_for(model: comfy.model_patcher.ModelPatcher, asked: str) -> str:
    """The precision that was asked for, or the one of the device that the model runs on."""
    if asked != AUTOMATIC_PRECISION:
        return asked
    return "bfloat16" if model.load_device.type in WITH_BFLOAT16 else "float32"
