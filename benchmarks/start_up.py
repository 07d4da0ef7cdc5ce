"""How much longer ComfyUI takes to start with this pack.

Starts ComfyUI's server in an empty base folder, with and without a link to this tree in ``custom_nodes``, by turns,
and waits for its first answer. Then says which modules are loaded for the pack alone, and what each one takes.

    seconds         from the start of the process to the server's first answer
    cpu_seconds     what the process had computed until then: the figure to go by on a machine that does other things
    import_seconds  what ComfyUI itself reports for the pack, to a tenth of a second
    modules         Python's own import times (-X importtime) of what is not loaded without the pack
"""

import argparse
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

from comfyui import comfyui_path, why_absent
from package import ROOT

PACK = "stylewright"
LONGEST = 300.0  # seconds to wait for an answer
REPORTED = re.compile(r"(\d+\.\d+) seconds(?: \(IMPORT FAILED\))?: .*" + PACK)
IMPORTED = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| \s*(\S+)")  # self and with what it imports, in microseconds
SHOWN = 12


@dataclass(frozen=True)
class Start:
    """One start."""

    seconds: float
    cpu_seconds: float
    import_seconds: float | None  # None without the pack


@dataclass(frozen=True)
class Comparison:
    """Medians over the starts, and over the differences of neighbours."""

    runs: int
    seconds_without: float
    seconds_with: float
    seconds_more: float
    cpu_seconds_without: float
    cpu_seconds_with: float
    cpu_seconds_more: float
    import_seconds: float
    modules_seconds: float  # all modules below together
    modules: dict[str, float]  # that only the pack loads: seconds of each without what it imports in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="starts of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs is at least 1")
    if reason := why_absent():
        parser.error(reason)
    with tempfile.TemporaryDirectory(prefix="stylewright-start-") as folder:
        plain, packed = (prepared(Path(folder) / name) for name in ("without", "with"))
        (packed / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
        comparison = compare(plain, packed, options.runs)
    print(json.dumps(asdict(comparison), indent=2) if options.json else table(comparison))


def prepared(base: Path) -> Path:
    (base / "custom_nodes").mkdir(parents=True)
    return base


def compare(plain: Path, packed: Path, runs: int) -> Comparison:
    loaded_plain, loaded_packed = import_times(plain), import_times(packed)  # also fills the caches of both
    starts = []
    for number in range(runs):
        starts.append((start(plain), start(packed)))
        without, with_pack = starts[-1]
        print(f"start {number + 1} of {runs}: {without} {with_pack}", file=sys.stderr)
    modules = {name: seconds for name, seconds in loaded_packed.items() if name not in loaded_plain}
    median = statistics.median
    return Comparison(
        runs=runs,
        seconds_without=median(a.seconds for a, _ in starts),
        seconds_with=median(b.seconds for _, b in starts),
        seconds_more=median(b.seconds - a.seconds for a, b in starts),
        cpu_seconds_without=median(a.cpu_seconds for a, _ in starts),
        cpu_seconds_with=median(b.cpu_seconds for _, b in starts),
        cpu_seconds_more=median(b.cpu_seconds - a.cpu_seconds for a, b in starts),
        import_seconds=median(b.import_seconds for _, b in starts),
        modules_seconds=sum(modules.values()),
        modules=dict(sorted(modules.items(), key=lambda item: -item[1])),
    )


def command(base: Path, *python: str) -> list[str]:
    return [sys.executable, *python, "main.py", "--cpu", "--base-directory", str(base), "--disable-auto-launch"]


def start(base: Path) -> Start:
    """Starts the server, waits for its answer and ends it."""
    import psutil  # one of ComfyUI's own requirements

    port = free_port()
    log = base / "log.txt"
    with log.open("w") as output:
        begun = time.perf_counter()
        server = subprocess.Popen(
            [*command(base), "--port", str(port)], cwd=comfyui_path(), stdout=output, stderr=subprocess.STDOUT
        )
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


def import_times(base: Path) -> dict[str, float]:
    """Seconds of every module that a start imports, each without what it imports in turn."""
    finished = subprocess.run(
        [*command(base, "-X", "importtime"), "--quick-test-for-ci", "--port", str(free_port())],
        cwd=comfyui_path(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LONGEST,
        check=True,
    )
    # The pack's folder becomes part of its modules' names.
    lines = (found for found in map(IMPORTED.match, finished.stderr.splitlines()) if found)
    return {found[3].rpartition(f"/{PACK}")[2] or PACK: int(found[1]) / 1e6 for found in lines}


def table(result: Comparison) -> str:
    rows = [
        f"{'median of ' + str(result.runs) + ' starts':26}{'without':>10}{'with':>10}{'more':>10}",
        f"{'seconds to the answer':26}{result.seconds_without:>10.2f}{result.seconds_with:>10.2f}"
        f"{result.seconds_more:>10.3f}",
        f"{'CPU seconds until then':26}{result.cpu_seconds_without:>10.2f}{result.cpu_seconds_with:>10.2f}"
        f"{result.cpu_seconds_more:>10.3f}",
        f"\nComfyUI reports {result.import_seconds:.1f} s for the pack.",
        f"Loaded for the pack alone: {len(result.modules)} modules in {1e3 * result.modules_seconds:.0f} ms.",
    ]
    dearest = list(result.modules.items())[:SHOWN]
    return "\n".join([*rows, *(f"{1e3 * seconds:>8.1f} ms  {name}" for name, seconds in dearest)])


if __name__ == "__main__":
    main()
