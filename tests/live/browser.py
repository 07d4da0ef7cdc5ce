"""A real Chromium, driven over its DevTools protocol: just enough to load ComfyUI's page and ask it questions."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START = 120  # seconds


class Page:
    """An open page."""

    def __init__(self, socket) -> None:
        self._socket, self._number = socket, 0

    async def send(self, method: str, **params) -> dict:
        """The result of a DevTools command."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, expression: str):
        """The value of a JavaScript expression; promises are waited for. AssertionError for what it throws."""
        answer = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, json.dumps(answer["exceptionDetails"], indent=1)
        return answer["result"].get("value")

    async def evaluate_again(self, expression: str, times: int = 3):
        """The same of what may be evaluated several times: a busy page may give up a promise that it was asked for."""
        for _ in range(times - 1):
            try:
                return await self.evaluate(expression)
            except AssertionError as error:
                if "Promise was collected" not in str(error):
                    raise
        return await self.evaluate(expression)

    async def screenshot(self, path: Path) -> None:
        """What is seen now, as a PNG, to look at."""
        answer = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    async def until(self, expression: str, seconds: float = START) -> None:
        """Waits for an expression to be true."""
        deadline = time.monotonic() + seconds
        while not await self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"the page never came to {expression}"
            await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Page]:
    """A page of a browser of its own."""
    import aiohttp

    # Chromium's own processes may write to it a little longer than the one that was ended.
    with tempfile.TemporaryDirectory(prefix="stylewright-browser-", ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "--window-size=1600,1200", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", process)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
                target = next(each for each in json.loads(answer.read()) if each["type"] == "page")
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket,
            ):
                page = Page(socket)
                await page.send("Page.navigate", url=url)
                yield page
        finally:
            process.terminate()
            process.wait(30)


async def _port(file: Path, process: subprocess.Popen) -> int:
    deadline = time.monotonic() + START
    while not file.exists() or not file.read_text().strip():
        assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
        await asyncio.sleep(0.2)
    return int(file.read_text().split()[0])
