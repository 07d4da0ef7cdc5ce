"""What is lost when training in ComfyUI is cancelled or killed, at random moments, many times.

    python benchmarks/interruptions.py --out trials --cancels 100 --server-cancels 100 --kills 50

Three kinds of trials, on the embedded model, with ComfyUI's own Python:

- *cancel*: in this process, ComfyUI's interrupt is set by another thread;
- *server cancel*: ``/interrupt`` of a real server;
- *kill*: SIGKILL of a real server, which is then started again.

A run is stopped at a moment drawn evenly over its length (encoding, steps, sample pictures, checkpoints), queued again,
stopped again at a moment of what is left, up to six times, and then ends by itself. Its adapter, its losses and its
learner's state are then compared bit for bit with those of a run that was never stopped. After every stop: the
checkpoint opens, has every whole step (after a kill: every one up to the last multiple of ``save_every`` that was
reported), the model without adapter answers as before, and nothing half written is left (after a kill: when the run
has ended).

Each finished run is a line of ``interruptions.jsonl``, so that the script goes on where it stopped; ``--report`` prints
the table of what is there.
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from comfyui import open_comfyui, why_absent
from interrupted_runs import (
    SAVE_EVERY,
    STEPS,
    TRAINER,
    Bench,
    Steps,
    Stop,
    base_answer,
    base_picture,
    job,
    read,
    require_success,
    trained,
)

CANCEL, SERVER, KILL = "cancel", "server cancel", "kill"
CHAIN = 6  # stops of one run at most


def trials(bench: Bench, kind: str, wanted: int) -> Iterator[tuple[int, random.Random]]:
    """Seeds of the runs that are missing until so many stops are in the file."""
    while True:
        runs, stops = bench.done(kind)
        if stops >= wanted:
            return
        yield runs, random.Random(f"{kind} {runs}")


def moment(draw: random.Random, length: float, done: int) -> float:
    """Seconds from the beginning of what is left of a run, evenly over it."""
    return draw.uniform(0, length * (1 - done / STEPS))


# --------------------------------------------------------------------------------------------------------------------
# In this process


def cancels(bench: Bench, wanted: int) -> None:
    open_comfyui(bench.base, "cpu")
    import comfy.model_management
    import torch

    from stylewright.nodes.bridge.embedded import load_embedded

    with torch.inference_mode():
        embedded = load_embedded()
    began = time.monotonic()
    bench.forget("straight")
    trained(embedded, "straight")
    length, straight, answer = time.monotonic() - began, bench.end_of("straight"), base_answer(embedded)
    for seed, draw in trials(bench, CANCEL, wanted):
        name = f"run{seed}"
        bench.forget(name)
        stops: list[Stop] = []
        while len(stops) < CHAIN:
            after = moment(draw, length, bench.stored(name))
            stop = cancelled(embedded, bench, name, after)
            if stop is None:
                break
            stop.unchanged = base_answer(embedded) == answer
            stops.append(stop)
        comfy.model_management.interrupt_current_processing(False)
        trained(embedded, name)
        bench.write(CANCEL, seed, stops, bench.end_of(name) == straight)
        bench.forget(name)


def cancelled(embedded: Any, bench: Bench, name: str, after: float) -> Stop | None:
    """Trains until the interrupt. None where the run ended before."""
    import comfy.model_management

    steps, pressed, before = Steps(), [], bench.stored(name)

    def press() -> None:
        pressed.append(time.monotonic())
        comfy.model_management.interrupt_current_processing()

    timer = threading.Timer(after, press)
    timer.start()
    try:
        trained(embedded, name, steps)
    except comfy.model_management.InterruptProcessingException:
        latency, stored = time.monotonic() - pressed[0], bench.stored(name)
        kept = stored == max(before, steps.whole)
        return Stop(after, latency, steps.whole, stored, kept, not bench.leftovers(), None)
    finally:
        timer.cancel()
        timer.join()
        comfy.model_management.interrupt_current_processing(False)
    return None


# --------------------------------------------------------------------------------------------------------------------
# Through a server


def server_cancels(bench: Bench, wanted: int) -> None:
    from live_server import Server

    server = Server(bench.base, bench.log)
    try:
        length, straight = straight_run(bench, server)
        picture = base_picture(bench, server)
        for seed, draw in trials(bench, SERVER, wanted):
            name = f"run{seed}"
            bench.forget(name)
            stops: list[Stop] = []
            while True:
                before = bench.stored(name)
                after = moment(draw, length, before)
                pressed: list[float] = []

                def press(pressed: list[float] = pressed) -> None:
                    pressed.append(time.monotonic())
                    server.interrupt()

                act = press if len(stops) < CHAIN else None
                heard = server.run(job(server, name), TRAINER, steps=STEPS, after=after, act=act)
                if heard.outcome != "interrupted":
                    break
                stored = bench.stored(name)
                clean, kept = not bench.leftovers(), stored >= max(before, heard.step)
                unchanged = base_picture(bench, server) == picture
                stops.append(Stop(after, heard.ended - pressed[0], heard.step, stored, kept, clean, unchanged))
            require_success(heard)
            bench.write(SERVER, seed, stops, bench.end_of(name) == straight)
    finally:
        server.stop()


def kills(bench: Bench, wanted: int) -> None:
    from live_server import Server

    def start() -> Server:
        return Server(bench.base, bench.log)

    server = start()
    try:
        length, straight = straight_run(bench, server)
        picture = base_picture(bench, server)
        for seed, draw in trials(bench, KILL, wanted):
            name = f"run{seed}"
            bench.forget(name)
            stops: list[Stop] = []
            while True:
                before = bench.stored(name)
                after = moment(draw, length, before)
                act = server.kill if len(stops) < CHAIN else None
                heard = server.run(job(server, name), TRAINER, steps=STEPS, after=after, act=act)
                if heard.outcome:
                    break
                stored = bench.stored(name)
                kept = stored >= max(before, heard.step // SAVE_EVERY * SAVE_EVERY)
                stops.append(Stop(after, 0.0, heard.step, stored, kept, not bench.leftovers(), None))
                server = start()
            require_success(heard)
            if stops:
                stops[-1].unchanged = base_picture(bench, server) == picture
            equal = bench.end_of(name) == straight and not bench.leftovers()
            bench.write(KILL, seed, stops, equal)
    finally:
        server.stop()


def straight_run(bench: Bench, server: Any) -> tuple[float, Any]:
    """Seconds of a run that is never stopped, and what it leaves."""
    bench.forget("straight")
    heard = server.run(job(server, "straight"), TRAINER, steps=STEPS)
    require_success(heard)
    return heard.ended - heard.began, bench.end_of("straight")


# --------------------------------------------------------------------------------------------------------------------


def report(lines: Sequence[dict[str, Any]]) -> str:
    """A table of all trials."""
    names = ["kind", "runs", "stops", "after a step", "returned, median", "95 %", "longest"]
    names += ["nothing lost", "equal to straight", "base unchanged", "nothing half written"]
    rows = [" | ".join(names), " | ".join(["---"] * len(names))]
    for kind in (CANCEL, SERVER, KILL):
        runs = [line for line in lines if line["kind"] == kind]
        stops = [stop for run in runs for stop in run["stops"]]
        if not stops:
            continue
        late = sorted(stop["latency"] for stop in stops)
        shown = (
            [f"{late[int(share * (len(late) - 1))]:.2f} s" for share in (0.5, 0.95, 1)] if kind != KILL else ["-"] * 3
        )
        checked = [stop["unchanged"] for stop in stops if stop["unchanged"] is not None]
        cells = [
            kind,
            len(runs),
            len(stops),
            sum(stop["stored"] > 0 for stop in stops),
            *shown,
            f"{sum(stop['kept'] for stop in stops)} of {len(stops)}",
            f"{sum(run['equal'] for run in runs)} of {len(runs)}",
            f"{sum(checked)} of {len(checked)}",
            f"{sum(stop['clean'] for stop in stops)} of {len(stops)}",
        ]
        rows.append(" | ".join(map(str, cells)))
    return "\n".join(f"| {row} |" for row in rows)


PARTS: dict[str, Callable[[Bench, int], None]] = {CANCEL: cancels, SERVER: server_cancels, KILL: kills}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("interruptions"), help="folder of the trials")
    for kind, default in ((CANCEL, 100), (SERVER, 100), (KILL, 50)):
        parser.add_argument(f"--{kind.replace(' ', '-')}s", type=int, default=default, help=f"stops by {kind}")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and stop")
    given = parser.parse_args()
    lines = given.out.resolve() / "interruptions.jsonl"
    if reason := None if given.report else why_absent():
        print(f"nothing to do: {reason}", file=sys.stderr)
        return 1
    for kind, part in PARTS.items() if not given.report else ():
        bench, wanted = Bench(given.out.resolve(), kind), getattr(given, f"{kind.replace(' ', '_')}s")
        if bench.done(kind)[1] < wanted:
            part(bench, wanted)
    print(report(read(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
