"""Stylewright: a ComfyUI pack that learns visual styles, and the training core that it stands on.

This folder is the package. ComfyUI finds the nodes through :func:`comfy_entrypoint`; everything else is
imported only when it is needed, so that this file can be loaded without ComfyUI and costs nothing.
"""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension object that ComfyUI asks for its nodes."""
    try:
        from .nodes import extension

        return extension()
    except Exception:
        # ComfyUI reports a failing entry point in one line; the traceback says where.
        logging.getLogger(__name__).exception("Stylewright could not be loaded")
        raise
