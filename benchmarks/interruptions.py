"""What is lost when training in ComfyUI is cancelled or killed, at random moments, many times.

    python benchmarks/interruptions.py --out trials --cancels 100 --server-cancels 100 --kills 50 --write-kills 25

Four kinds of trials, on the embedded model, with ComfyUI's own Python:

- *cancel*: in this process, ComfyUI's interrupt is set by another thread;
- *server cancel*: ``/interrupt`` of a real server;
- *kill*: SIGKILL of a real server, which is then started again;
- *write kill*: the same, once a file is half written.

A run is stopped, queued again and goes on, is stopped again, up to six times, and then ends by itself. Its adapter, its
losses and its learner's state are then compared bit for bit with those of a run that was never stopped. After every
stop: the checkpoint opens, has every whole step (after a kill: every one up to the last multiple of ``save_every`` that
was reported), the model without adapter answers as before, and nothing half written is left (after a kill: when the
run has ended).

The moments of a server's run are six points drawn evenly over its steps, in their order. The run that was never stopped
tells between which of the node's reports a point lies, and what share of the time between them it is: so many seconds
after that report the run is stopped, in the midst of a step, a sample picture or a checkpoint. Before the
first report everything is encoded, measured, and drawn a first time. A point that the run has passed already means the
same time of a continued run: from its beginning to its first report. Kills have a piece more, from the last report to
the node's end, in which the adapter is published; an interrupt that comes then is too late to be one. A write kill
comes with the first temporary file that is seen after its moment. In this process a moment is drawn evenly over the
seconds of what is left.

Each finished run is a line of ``interruptions.jsonl``, so that the script goes on where it stopped; ``--report`` prints
the table of what is there.
"""

import argparse
import random
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from live_server import Moment, Server

CANCEL, SERVER, KILL, WRITE = "cancel", "server cancel", "kill", "write kill"
CHAIN = 6  # stops of one run at most
LONGEST_WAIT = 5  # seconds for a file to be written; there may be none any more


def trials(bench: Bench, kind: str, wanted: int) -> Iterator[tuple[int, random.Random]]:
    """Seeds of the runs that are missing until so many stops are in the file."""
    while True:
        runs, stops = bench.done(kind)
        if stops >= wanted:
            return
        yield runs, random.Random(f"{kind} {runs}")


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
            after = draw.uniform(0, length * (1 - bench.stored(name) / STEPS))
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
        return Stop(after, latency, steps.whole, stored, kept, not bench.leftovers(), unchanged=False)
    finally:
        timer.cancel()
        timer.join()
        comfy.model_management.interrupt_current_processing(False)
    return None


# --------------------------------------------------------------------------------------------------------------------
# Through a server


def server_trials(kind: str, bench: Bench, wanted: int) -> None:
    server = Server(bench.base, bench.log)
    try:
        picture = base_picture(bench, server)
        if kind == SERVER:  # it goes on working, and what it does again is faster than the first time
            straight_run(bench, server, "first")
        pace, straight = straight_run(bench, server, "straight")
        for seed, draw in trials(bench, kind, wanted):
            name = f"run{seed}"
            bench.forget(name)
            stops: list[Stop] = []
            end = STEPS if kind == SERVER else STEPS + 1
            for point in [*sorted(draw.uniform(0, end) for _ in range(CHAIN)), None]:
                at = None if point is None else moment(point, bench.stored(name), pace)
                stop = stopped(kind, bench, server, name, at)
                if stop is None:
                    break
                stop.unchanged = base_picture(bench, server) == picture
                stops.append(stop)
            if kind != SERVER:
                for stop in stops:
                    stop.clean = not bench.leftovers()
            bench.write(kind, seed, stops, bench.end_of(name) == straight)
    finally:
        server.stop()


def stopped(kind: str, bench: Bench, server: Server, name: str, at: Moment | None) -> Stop | None:
    """Trains until the moment, and has a server again. None where the run ended before."""
    before = bench.stored(name)
    act = {SERVER: server.interrupt, KILL: server.kill, WRITE: partial(kill_in_a_write, bench, server)}[kind]
    heard = server.run(job(server, name), TRAINER, steps=STEPS, at=at, act=act)
    if heard.acted is None or (kind == SERVER and heard.outcome == "success"):
        require_success(heard)
        return None
    stored, torn, due = bench.stored(name), bool(bench.leftovers()), heard.step
    if kind != SERVER:
        server.start()
        due = heard.step if heard.step == STEPS else heard.step // SAVE_EVERY * SAVE_EVERY
    elif heard.outcome != "interrupted":
        require_success(heard)
    after, latency = heard.acted - heard.reports[0][1], heard.ended - heard.acted
    return Stop(after, latency, heard.step, stored, stored >= max(before, due), not torn, unchanged=False, torn=torn)


def kill_in_a_write(bench: Bench, server: Server) -> None:
    until = time.monotonic() + LONGEST_WAIT
    while not bench.leftovers() and time.monotonic() < until:
        pass
    server.kill()


Pace = list[tuple[int, float]]  # (step, seconds since the node began) of each report, and (STEPS + 1, …) as it ends


def straight_run(bench: Bench, server: Server, name: str) -> tuple[Pace, Any]:
    """The pace of a run that is never stopped, and what it leaves."""
    bench.forget(name)
    heard = server.run(job(server, name), TRAINER, steps=STEPS)
    require_success(heard)
    began = heard.reports[0][1]
    pace = [(step, seconds - began) for step, seconds in (*heard.reports, (STEPS + 1, heard.ended))]
    return pace, bench.end_of(name)


def moment(point: float, done: int, pace: Pace) -> Moment:
    """When a run that goes on after ``done`` steps is at a point of 0 to STEPS + 1."""
    later = bisect_right(pace, point, key=lambda report: report[0])
    (step, began), (following, ended) = pace[later - 1 : later + 1]
    share = (point - step) / (following - step)
    if step <= done:  # not reported again
        return Moment(0, share * pace[1][1])
    return Moment(step, share * (ended - began))


# --------------------------------------------------------------------------------------------------------------------


def report(lines: Sequence[dict[str, Any]]) -> str:
    """A table of all trials, and one of their moments."""
    found, moments = [FOUND], [("kind", *MOMENTS, "in the writing of a file")]
    for kind in PARTS:
        runs = [line for line in lines if line["kind"] == kind]
        stops = [stop for run in runs for stop in run["stops"]]
        if not stops:
            continue
        late = sorted(stop["latency"] for stop in stops)
        shown = [f"{late[int(share * (len(late) - 1))]:.2f} s" for share in (0.5, 0.95, 1)]
        checks = [[run["equal"] for run in runs]]
        checks += [[stop[check] for stop in stops] for check in ("kept", "unchanged", "clean")]
        counts = [f"{sum(passed)} of {len(passed)}" for passed in checks]
        found.append((kind, len(runs), len(stops), *(["-"] * 3 if kind in (KILL, WRITE) else shown), *counts))
        torn = sum(stop["torn"] for stop in stops) if kind in (KILL, WRITE) else "-"
        reported = [sum(stop["reported"] in steps for stop in stops) for steps in MOMENTS.values()]
        moments.append((kind, *reported, torn))
    return f"{table(found)}\n\n{table(moments)}"


FOUND = ("kind", "runs", "stops", "returned, median", "95 %", "longest")
FOUND += ("equal to straight", "nothing lost", "base unchanged", "nothing half written")
MOMENTS = {  # by the last step that was reported
    "before the first report": range(1),
    "1 to 6": range(1, 7),
    "7 to 12": range(7, 13),
    "13 to 18": range(13, 19),
    "19 to 23": range(19, STEPS),
    "after the last": range(STEPS, STEPS + 1),
}


def table(rows: Sequence[Sequence[Any]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rest))


PARTS: dict[str, Callable[[Bench, int], None]] = {
    CANCEL: cancels,
    SERVER: partial(server_trials, SERVER),
    KILL: partial(server_trials, KILL),
    WRITE: partial(server_trials, WRITE),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("interruptions"), help="folder of the trials")
    for kind, default in ((CANCEL, 100), (SERVER, 100), (KILL, 50), (WRITE, 25)):
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
