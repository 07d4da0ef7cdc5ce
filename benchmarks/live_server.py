"""A real ComfyUI server with this repository as its one custom node: started, queued to, listened to, killed."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfyui import comfyui_path
from package import ROOT

START = 600  # seconds that a server may take on a busy machine
PACK = "stylewright"


@dataclass(frozen=True)
class Moment:
    """So many seconds after a node reports a step, or a later one; after it begins to work, where the step is 0."""

    step: int
    seconds: float


@dataclass
class Heard:
    """What a queued prompt's websocket said, with times in seconds of ``time.monotonic``."""

    outcome: str = ""  # "success", "interrupted", "error"; "" where the connection broke
    reports: list[tuple[int, float]] = field(default_factory=list)  # (step, time) of a node; (0, time) as it begins
    acted: float | None = None  # when something was done to it; None = it ended before
    ended: float = 0.0
    problem: dict[str, Any] = field(default_factory=dict)  # of an error

    @property
    def step(self) -> int:
        """Last one reported."""
        return self.reports[-1][0] if self.reports else 0


class Server:
    """A running ComfyUI on the CPU."""

    def __init__(self, base: Path, log: Path) -> None:
        """Starts it. RuntimeError with its log where it does not answer."""
        for folder in ("custom_nodes", "models/loras", "input", "output", "temp", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        if not (base / "custom_nodes" / PACK).exists():
            (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
        self.base, self.log = base, log
        self.start()

    def start(self) -> None:
        """Starts it, also anew after a kill, and waits until it answers."""
        self.port = _free_port()
        command = [sys.executable, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--cache-classic"]
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command, cwd=comfyui_path(), stdout=file, stderr=file, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
        self.info = self._wait()

    def _wait(self) -> dict[str, Any]:
        deadline = time.monotonic() + START
        while True:
            try:
                return self.get("object_info")
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"ComfyUI does not answer: {self.log}") from error
                time.sleep(0.5)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=120) as answer:
            return json.loads(answer.read())

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"/{path}: {error.read().decode()}") from error

    def interrupt(self) -> None:
        self.post("interrupt", {})

    def kill(self) -> None:
        """SIGKILL, and nothing else."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def defaults(self, node: str) -> dict[str, Any]:
        """The widgets of a node at their defaults."""
        schema, found = self.info[node], {}
        for group in ("required", "optional"):
            for name, (kind, *rest) in schema["input"].get(group, {}).items():
                options = rest[0] if rest else {}
                if "default" in options:
                    found[name] = options["default"]
                elif isinstance(kind, list):
                    found[name] = kind[0]
        return found

    def run(
        self,
        prompt: Mapping[str, Any],
        node: str,
        *,
        steps: int = 0,  # that the node reports
        at: Moment | None = None,
        act: Callable[[], None] | None = None,
        timeout: float = 1200,
    ) -> Heard:
        """Queues a prompt and listens until it ends. ``act`` is done at a moment of ``node``, unless it ends before."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, node, steps, at, act), timeout))

    async def _run(
        self, prompt: Mapping[str, Any], node: str, steps: int, at: Moment | None, act: Callable[[], None] | None
    ) -> Heard:
        import aiohttp

        heard, acting = Heard(), None
        url = f"ws://127.0.0.1:{self.port}/ws?clientId=interruptions"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as connection:
            queued = self.post("prompt", {"prompt": prompt, "client_id": "interruptions"})["prompt_id"]
            async for message in connection:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                _note(heard, json.loads(message.data), node, queued, steps)
                if heard.outcome:
                    break
                if at and act and not acting and heard.reports and heard.step >= at.step:
                    due = heard.reports[-1][1] + at.seconds
                    acting = asyncio.get_running_loop().run_in_executor(None, _later, due, act, heard)
        heard.ended = heard.ended or time.monotonic()
        if acting:
            await acting
        return heard


def _later(due: float, act: Callable[[], None], heard: Heard) -> None:
    """Acts when it is time, unless the prompt has ended by then."""
    while time.monotonic() < due and not heard.ended:
        time.sleep(0.001)
    if not heard.ended:
        heard.acted = time.monotonic()
        act()


def _note(heard: Heard, said: dict[str, Any], node: str, queued: str, steps: int) -> None:
    kind, data, now = said["type"], said.get("data", {}), time.monotonic()
    if data.get("prompt_id") not in (None, queued):
        return
    if kind == "executing" and data.get("node") == node:
        heard.reports.append((0, now))
    if kind == "progress" and data.get("node") == node and data["max"] == steps:
        heard.reports.append((data["value"], now))
    if kind == "execution_error":
        heard.outcome, heard.problem = "error", data
    if kind == "execution_interrupted":
        heard.outcome = "interrupted"
    if kind == "executing" and data.get("node") is None and data.get("prompt_id") == queued:
        heard.outcome = heard.outcome or "success"
    if heard.outcome:
        heard.ended = now


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
