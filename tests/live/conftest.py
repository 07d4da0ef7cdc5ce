"""A real ComfyUI server with this folder as one of its custom nodes, for the tests of this folder."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

for name in ("workflow_api", "browser"):  # importable without a folder on sys.path
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

START = 240  # seconds that a server may take on a busy machine
NAME = "any_name-v1.2"  # of the folder in custom_nodes


@dataclass
class Server:
    """A running ComfyUI."""

    port: int
    base: Path  # its --base-directory
    log: Path
    process: subprocess.Popen
    info: dict = field(default_factory=dict)  # /object_info

    @property
    def text(self) -> str:
        """What it has logged so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=60) as answer:
            return answer.read()

    def json(self, path: str) -> dict:
        return json.loads(self.get(path))

    def post(self, path: str, content: dict) -> dict:
        """The answer, also one that says what is wrong."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def run(self, prompt: dict, *, timeout: float = 600, interrupt_at: int | None = None) -> dict:
        """Queues a prompt and waits for it. ``interrupt_at``: cancel when a node reports this step.

        The prompt's entry of /history, with what came over the websocket under ``messages`` and ``previews``.
        """
        import asyncio

        return asyncio.run(self._run(prompt, timeout, interrupt_at))

    async def _run(self, prompt: dict, timeout: float, interrupt_at: int | None) -> dict:
        import aiohttp

        messages, previews = [], 0
        url = f"ws://127.0.0.1:{self.port}/ws?clientId=tests"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket_:
            queued = self.post("prompt", {"prompt": prompt, "client_id": "tests"})
            assert "prompt_id" in queued, json.dumps(queued, indent=1)
            deadline = time.monotonic() + timeout
            while True:
                message = await socket_.receive(timeout=max(1, deadline - time.monotonic()))
                if message.type == aiohttp.WSMsgType.BINARY:
                    previews += 1
                    messages.append({"type": "binary", "data": message.data})
                    continue
                assert message.type == aiohttp.WSMsgType.TEXT, message
                content = json.loads(message.data)
                messages.append(content)
                kind, data = content["type"], content.get("data", {})
                if kind == "progress" and interrupt_at is not None and data["value"] >= interrupt_at:
                    self.post("interrupt", {})
                    interrupt_at = None
                if data.get("prompt_id") == queued["prompt_id"]:
                    if kind in ("execution_error", "execution_interrupted"):
                        break
                    if kind == "executing" and data["node"] is None:
                        break
        return {**self.history(queued["prompt_id"]), "messages": messages, "previews": previews}

    def history(self, prompt_id: str) -> dict:
        """The entry of a prompt that has ended, which the server writes after it has said so."""
        deadline = time.monotonic() + 60
        while not (entry := self.json(f"history/{prompt_id}").get(prompt_id)):
            assert time.monotonic() < deadline, f"{prompt_id} is not in the history:\n{self.text}"
            time.sleep(0.1)
        return entry


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(checkout: Path, base: Path, *, pack: Path | None):
    """A server, started and stopped."""
    for folder in ("custom_nodes", "models/loras", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    if pack:
        (base / "custom_nodes" / NAME).symlink_to(pack, target_is_directory=True)
    port, log = free_port(), base / "server.log"
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base)]
    command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=checkout, stdout=file, stderr=subprocess.STDOUT, env=environment)
    server = Server(port, base, log, process)
    try:
        deadline = time.monotonic() + START
        while not server.info:
            assert process.poll() is None, f"ComfyUI stopped:\n{server.text}"
            assert time.monotonic() < deadline, f"ComfyUI does not answer:\n{server.text}"
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                server.info = server.json("object_info")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def server(comfy, repository):
    """ComfyUI with the pack. Skips where there is none."""
    with (
        tempfile.TemporaryDirectory(prefix="stylewright-live-") as base,
        running(comfy, Path(base), pack=repository) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def shipped_weights():
    """Skips where the embedded model has not been built."""
    from stylewright.training.embedded.weights import Weights

    weights = Weights()
    for path in (weights.transformer, weights.autoencoder, weights.text_encoder):
        if not path.exists():
            pytest.skip(f"the embedded model is not built: {path.name} is missing")
