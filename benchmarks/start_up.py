"""How much longer ComfyUI takes to start with this pack.

    seconds           from the start of ComfyUI's process to its server's first answer, in an empty base folder, with
                      and without a link to this tree in custom_nodes, by turns
    cpu_seconds       what the process had computed until then
    import_seconds    what ComfyUI itself reports for the pack, to a tenth of a second
    pack_cpu_seconds  processor time of loading the pack into a process that has loaded all of ComfyUI's own nodes,
                      by ComfyUI's own loader: the figure to go by on a machine that does other things, where two
                      starts differ by more than the pack takes
    modules           what of it each module takes, without those that it imports

Python's garbage collector may happen to go through all of ComfyUI's objects while the pack is loaded, whoever made
them; pack_cpu_seconds is without that.
"""

import argparse
import asyncio
import gc
import importlib.machinery
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from comfyui import comfyui_path, open_comfyui, why_absent
from package import ROOT

PACK = "stylewright"
LONGEST = 600.0  # seconds to wait for an answer
REPORTED = re.compile(r"(\d+\.\d+) seconds(?: \(IMPORT FAILED\))?: .*" + PACK)
SHOWN = 12


@dataclass(frozen=True)
class Start:
    """One start of the server."""

    seconds: float
    cpu_seconds: float
    import_seconds: float | None  # None without the pack


@dataclass(frozen=True)
class Comparison:
    """Medians: of the starts, and of the differences between neighbours."""

    runs: int
    seconds_without: float
    seconds_with: float
    seconds_more: float
    cpu_seconds_without: float
    cpu_seconds_with: float
    cpu_seconds_more: float
    import_seconds: float
    pack_cpu_seconds: float
    modules: dict[str, float]  # slowest first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="starts of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--load", type=Path, metavar="BASE", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs is at least 1")
    if reason := why_absent():
        parser.error(reason)
    if options.load:
        print(json.dumps(asyncio.run(load_times(options.load))))
        return
    with tempfile.TemporaryDirectory(prefix="stylewright-start-") as folder:
        comparison = compare(Path(folder), options.runs)
    print(json.dumps(asdict(comparison), indent=2) if options.json else table(comparison))


def compare(folder: Path, runs: int) -> Comparison:
    plain, packed = folder / "without", folder / "with"
    for base in (plain, packed):
        (base / "custom_nodes").mkdir(parents=True)
    (packed / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
    starts, loads = [], []
    loaded_apart(folder / "first")  # compiles what has changed
    for number in range(runs):
        order = (plain, packed) if number % 2 == 0 else (packed, plain)
        both = {base: start(base) for base in order}
        starts.append((both[plain], both[packed]))
        loads.append(loaded_apart(folder / f"load-{number}"))
        shown = ", ".join(f"{s.seconds:.2f} s ({s.cpu_seconds:.2f} s CPU)" for s in starts[-1])
        print(f"start {number + 1} of {runs}: without and with {shown}", file=sys.stderr)
    median = statistics.median
    modules = {name: median(load[name] for load in loads) for name in loads[0]}
    return Comparison(
        runs=runs,
        seconds_without=median(a.seconds for a, _ in starts),
        seconds_with=median(b.seconds for _, b in starts),
        seconds_more=median(b.seconds - a.seconds for a, b in starts),
        cpu_seconds_without=median(a.cpu_seconds for a, _ in starts),
        cpu_seconds_with=median(b.cpu_seconds for _, b in starts),
        cpu_seconds_more=median(b.cpu_seconds - a.cpu_seconds for a, b in starts),
        import_seconds=median(b.import_seconds or 0.0 for _, b in starts),
        pack_cpu_seconds=median(sum(load.values()) for load in loads),
        modules=dict(sorted(modules.items(), key=lambda item: -item[1])),
    )


# --------------------------------------------------------------------------------------------------------------------
# The server


def start(base: Path) -> Start:
    """Starts the server, waits for its answer and ends it."""
    import psutil  # one of ComfyUI's own requirements

    port, log = free_port(), base / "log.txt"
    command = [sys.executable, "main.py", "--cpu", "--base-directory", str(base), "--port", str(port)]
    with log.open("w") as output:
        begun = time.perf_counter()
        server = subprocess.Popen(command, cwd=comfyui_path(), stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for(f"http://127.0.0.1:{port}/system_stats", server, log)
            seconds = time.perf_counter() - begun
            used = psutil.Process(server.pid).cpu_times()
        finally:
            server.terminate()
            server.wait(60)
    return Start(seconds, used.user + used.system, reported(log.read_text()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    begun = time.perf_counter()
    while time.perf_counter() - begun < LONGEST:
        if server.poll() is not None:
            raise SystemExit(f"ComfyUI ended with status {server.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.02)
    raise SystemExit(f"ComfyUI did not answer within {LONGEST:.0f} seconds:\n{log.read_text()[-4000:]}")


def reported(log: str) -> float | None:
    """ComfyUI's own figure for the pack. SystemExit where the pack failed to load."""
    if "IMPORT FAILED" in log or "Error while calling comfy_entrypoint" in log:
        raise SystemExit(f"the pack could not be loaded:\n{log[-4000:]}")
    found = REPORTED.search(log)
    return float(found[1]) if found else None


# --------------------------------------------------------------------------------------------------------------------
# Loading the pack alone


def loaded_apart(base: Path) -> dict[str, float]:
    """What :func:`load_times` says in a fresh process."""
    command = [sys.executable, str(Path(__file__)), "--load", str(base)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LONGEST, stderr=subprocess.DEVNULL)
    if finished.returncode:
        raise SystemExit(f"loading the pack failed: see {' '.join(command)}")
    return json.loads(finished.stdout.splitlines()[-1])


async def load_times(base: Path) -> dict[str, float]:
    """Processor seconds of each module of the pack, and of "nodes' schemas and the rest"."""
    open_comfyui(base, "cpu")
    import nodes
    import server

    server.PromptServer(asyncio.get_running_loop())
    await nodes.init_extra_nodes(init_custom_nodes=False)
    pack = base / "custom_nodes" / PACK
    pack.parent.mkdir(exist_ok=True)
    pack.symlink_to(ROOT, target_is_directory=True)
    seconds = times_of_imports()
    gc.collect()
    gc.disable()
    begun = time.process_time()
    if not await nodes.load_custom_node(str(pack), module_parent="custom_nodes"):
        raise SystemExit("ComfyUI could not load the pack")
    seconds["(schemas and the rest)"] = time.process_time() - begun - sum(seconds.values())
    return {name.removeprefix(str(pack)).removeprefix(".") or PACK: value for name, value in seconds.items()}


def times_of_imports() -> dict[str, float]:
    """From now on filled with the processor seconds of every module, without what it imports in turn."""
    seconds: dict[str, float] = {}
    inner = [0.0]
    loader: Any = importlib.machinery.SourceFileLoader
    plain = loader.exec_module

    def timed(self: Any, module: ModuleType) -> None:
        begun = time.process_time()
        inner.append(0.0)
        plain(self, module)
        whole = time.process_time() - begun
        seconds[module.__name__] = whole - inner.pop()
        inner[-1] += whole

    loader.exec_module = timed
    return seconds


def table(result: Comparison) -> str:
    rows = [
        f"{'median of ' + str(result.runs) + ' starts':26}{'without':>10}{'with':>10}{'more':>10}",
        f"{'seconds to the answer':26}{result.seconds_without:>10.2f}{result.seconds_with:>10.2f}"
        f"{result.seconds_more:>10.3f}",
        f"{'CPU seconds until then':26}{result.cpu_seconds_without:>10.2f}{result.cpu_seconds_with:>10.2f}"
        f"{result.cpu_seconds_more:>10.3f}",
        f"\nComfyUI reports {result.import_seconds:.1f} s for the pack.",
        f"Loading it alone takes {1e3 * result.pack_cpu_seconds:.0f} ms of CPU, {len(result.modules) - 1} modules:",
    ]
    slowest = list(result.modules.items())[:SHOWN]
    return "\n".join([*rows, *(f"{1e3 * seconds:>8.1f} ms  {name}" for name, seconds in slowest)])


if __name__ == "__main__":
    main()
