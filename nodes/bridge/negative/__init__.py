"""Negative prompts inside attention, by family: a clone of a model whose positive prompt is held against them.

``conds``   what a negative CONDITIONING says, as a model is told of it
``gate``    which calls of a model are given it, and what is known inside of one
``attend``  one attention to a text, guided
``split``   one attention of image and text together, with the negative texts in it
``unet``, ``separate``, ``pixart``, ``joint``, ``refined``: how each kind of model is reached, by ComfyUI's own hooks
"""

from .apply import Unsupported, apply

__all__ = ["Unsupported", "apply"]
