"""Our training step against a plain diffusers + peft loop and against ComfyUI's TrainLoraNode.

One small FLUX (hidden 384, 2 double and 4 single blocks, 64 text and 256 image tokens), the same batch, rank and
precision, the layers that each can be told to adapt. Two layouts of the same model, each with a contender of ours:

    stylewright          against diffusers-peft    diffusers' layout, 44 adapted layers
    stylewright-comfyui  against comfyui-native    ComfyUI's layout, where q, k, v and an MLP's half are one: 24 layers

``seconds`` is of one optimizer step, from the end of one optimizer's work to the end of the next: data, noise,
forward, backward, clipping, update and whatever else the loop does. On the CPU it is processor time of one thread.
``extra_bytes`` is the most that adapters, optimizer state, activations and temporaries take at once.

Every contender has a process of its own; they take turns, so that what else the machine does hits all alike.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from comfyui import why_absent

RATIOS = (
    ("stylewright", "diffusers-peft"),
    ("stylewright-comfyui", "comfyui-native"),
    ("stylewright", "comfyui-native"),  # across layouts: ours does more and smaller products
)
MEGABYTE = 2**20


@dataclass(frozen=True)
class Result:
    """What was measured of one contender."""

    seconds: float  # of an optimizer step: least of the rounds' means
    median_seconds: float  # median of the rounds' means
    extra_bytes: int  # beyond the loaded model
    gflop: float  # of an optimizer step, counted


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes to come
    with workers(options) as connections:
        results = measure(connections, options)
    if options.json:
        print(json.dumps({name: asdict(result) for name, result in results.items()}, indent=2))
    else:
        show(results, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps in each round")
    parser.add_argument("--rounds", type=int, default=6, help="turns of every contender")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute every block (ComfyUI's node: depth 2 instead of 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each contender, on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    if min(options.steps, options.rounds, options.batch_size, options.rank, options.threads) < 1:
        parser.error("--steps, --rounds, --batch-size, --rank and --threads are at least 1")
    return options


# --------------------------------------------------------------------------------------------------------------------
# Here: taking turns


@contextmanager
def workers(options: argparse.Namespace) -> Iterator[dict[str, Connection]]:
    """A process for every contender that can run here, ready to work. Those that cannot are named on stderr."""
    context = multiprocessing.get_context("spawn")
    names = ["stylewright", "diffusers-peft"]
    reason = why_absent()
    if reason:
        print(f"without comfyui-native and stylewright-comfyui: {reason}", file=sys.stderr)
    else:
        names += ["stylewright-comfyui", "comfyui-native"]
    connections: dict[str, Connection] = {}
    processes = []
    try:
        for name in names:
            connections[name], theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(name, vars(options), theirs), daemon=True))
            processes[-1].start()
            theirs.close()  # so that the death of a worker is noticed
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for process in processes:
            process.join(10)
            process.kill()


def measure(connections: dict[str, Connection], options: argparse.Namespace) -> dict[str, Result]:
    """One contender works at a time."""
    costs = {name: ask(name, connection, "costs") for name, connection in connections.items()}
    rounds: dict[str, list[float]] = {name: [] for name in connections}
    for number in range(options.rounds):
        for name, connection in connections.items():
            rounds[name].append(ask(name, connection, "round"))
            print(f"round {number + 1} of {options.rounds}: {name} {1e3 * rounds[name][-1]:.0f} ms", file=sys.stderr)
    return {name: Result(min(seconds), statistics.median(seconds), **costs[name]) for name, seconds in rounds.items()}


def ask(name: str, connection: Connection, question: str) -> Any:
    try:
        connection.send(question)
        answer = connection.recv()
    except (EOFError, BrokenPipeError) as error:
        raise SystemExit(f"{name} ended before it answered") from error
    if isinstance(answer, Failure):
        raise SystemExit(f"{name} failed:\n{answer.text}")
    return answer


@dataclass(frozen=True)
class Failure:
    text: str


# --------------------------------------------------------------------------------------------------------------------
# In a contender's process


def work(name: str, options: dict[str, Any], connection: Connection) -> None:
    """Answers until nobody asks any more."""
    try:
        answers = prepare(name, options)
        while True:
            connection.send(answers[connection.recv()]())
    except EOFError:
        return
    except Exception:
        connection.send(Failure(traceback.format_exc()))


def prepare(name: str, options: dict[str, Any]) -> dict[str, Any]:
    import torch
    from contenders import Task, open_contender

    torch.set_num_threads(options["threads"])
    train = open_contender(
        name, Task(options["batch_size"], options["rank"], options["checkpointing"], options["device"])
    )
    measured_costs = costs_on_cuda if options["device"] == "cuda" else costs
    return {
        "costs": lambda: {"extra_bytes": measured_costs(train), "gflop": gflop(train)},
        "round": lambda: seconds_a_step(train, options["steps"], options["device"]),
    }


def seconds_a_step(train: Any, steps: int, device: str) -> float:
    """Mean over ``steps`` steps, after one that is not counted."""
    marks = []
    with after_each_step(lambda: marks.append(now(device))):
        train(steps + 1)
    return (marks[-1] - marks[0]) / steps


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def after_each_step(callback: Any) -> Iterator[None]:
    """Calls back after every step of whatever optimizer of torch's."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: callback())
    try:
        yield
    finally:
        handle.remove()


def costs(train: Any) -> int:
    """Bytes of all tensors that training makes; three steps, so that the optimizer's state is there in two."""
    from peak_bytes import PeakBytes

    with PeakBytes() as memory:
        train(3)
    return memory.peak


def costs_on_cuda(train: Any) -> int:
    """What the device held at most, less one copy of the model, which ComfyUI loads in the course of training."""
    import torch
    from contenders import DOUBLE_BLOCKS  # noqa: F401

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(3)
    return torch.cuda.max_memory_allocated() - before


def gflop(train: Any) -> float:
    """Of one step, as torch counts the products; elementwise work is not in it."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counts = []
    with counter, after_each_step(lambda: counts.append(counter.get_total_flops())):
        train(2)
    return (counts[-1] - counts[0]) / 1e9


# --------------------------------------------------------------------------------------------------------------------


def show(results: dict[str, Result], options: argparse.Namespace) -> None:
    how = "every block recomputed" if options.checkpointing else "recomputing only where it cannot be switched off"
    print(f"batch {options.batch_size}, rank {options.rank}, float32, {how}")
    print(f"\n{'':22}{'ms a step':>10}{'median':>10}{'extra MB':>10}{'GFLOP':>10}")
    for name, result in results.items():
        seconds = f"{1e3 * result.seconds:>10.1f}{1e3 * result.median_seconds:>10.1f}"
        print(f"{name:22}{seconds}{result.extra_bytes / MEGABYTE:>10.1f}{result.gflop:>10.2f}")
    print(f"\n{'ratio of':46}{'time':>8}{'memory':>8}")
    for ours, theirs in RATIOS:
        if ours in results and theirs in results:
            mine, other = results[ours], results[theirs]
            ratios = f"{mine.seconds / other.seconds:>8.2f}{mine.extra_bytes / other.extra_bytes:>8.2f}"
            print(f"{f'{ours} to {theirs}':46}{ratios}")


if __name__ == "__main__":
    main()
