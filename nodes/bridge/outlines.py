"""What an adapter's file is, for the page to show as soon as it is picked: web/adapters.js asks here.

Only files that ComfyUI lists in its LoRA folders are opened, and of them the header alone is read.
"""

import asyncio
from typing import Any

from .files import adapter_names, adapter_path

ROUTE = "/stylewright/adapter"


def outline(name: str) -> dict[str, Any]:
    """The file's description, or what is wrong with it. Nothing is said of a name that ComfyUI does not list."""
    from ...training.formats.contents import read_outline  # not at start-up
    from ...training.formats.description import describe

    if name not in adapter_names():
        return {"text": "", "failed": False}
    path = adapter_path(name)
    try:
        return {"text": describe(read_outline(path)), "failed": False}
    except (ValueError, OSError) as error:
        return {"text": str(error).replace(str(path), name), "failed": True}


def serve_outlines() -> None:
    """Adds the route ROUTE to the running server: ``?name=`` an entry of a loader's list."""
    from aiohttp import web
    from server import PromptServer  # ComfyUI's own, which only a running server has loaded

    if "instance" not in vars(PromptServer):
        return

    @PromptServer.instance.routes.get(ROUTE)
    async def adapter(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(outline, request.query.get("name", "")))
