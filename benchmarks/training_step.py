"""Our training step against a plain diffusers + peft loop and against ComfyUI's TrainLoraNode.

One small model (FLUX: hidden 384, 2 double and 4 single blocks; SD3: hidden 384, 4 blocks; SDXL: 64 and 128 channels),
the same batch of latents with 32 a side, rank and precision. Two layouts of the same model, each with a contender of
ours, which adapts the linear layers inside the blocks but those for modulation:

    stylewright          against diffusers-peft    diffusers' layout; the same layers
    stylewright-comfyui  against comfyui-native    ComfyUI's layout, q, k and v in one in FLUX and SD3; the native node
                                                   has no choice of layers: it adapts every weight, norm and bias
                         and comfyui-native-bypass the same in its bypass mode

``seconds`` is of one optimizer step, from the end of one optimizer's work to the end of the next: data, noise,
forward, backward, clipping, update and whatever else the loop does. On the CPU it is processor time of one thread.
``extra_bytes`` is the most that adapters, optimizer state, activations and temporaries take at once, ``trained`` how
many numbers the optimizer trains.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from comfyui import why_absent

RATIOS = (
    ("stylewright", "diffusers-peft"),
    ("stylewright-comfyui", "comfyui-native"),
    ("stylewright-comfyui", "comfyui-native-bypass"),
    ("stylewright", "comfyui-native"),  # across layouts: where q, k and v are one, ours does more and smaller products
)
MEGABYTE = 2**20

Training = Callable[[int], object]  # optimizer steps -> whatever


@dataclass(frozen=True)
class Result:
    """What was measured of one contender."""

    seconds: float  # of an optimizer step: least of the rounds' means, which others' work disturbs least
    median_seconds: float  # median of the rounds' means
    extra_bytes: int  # beyond the loaded model
    gflop: float  # of an optimizer step, counted; elementwise work is not in it
    trained: int  # numbers


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
    parser.add_argument("--model", choices=["flux", "sd3", "sdxl"], default="flux", help="a small one of the family")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps in each turn")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute every block (ComfyUI's node: at depth 2)"
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
        print(f"without the contenders inside ComfyUI: {reason}", file=sys.stderr)
    else:
        names += ["stylewright-comfyui", "comfyui-native", "comfyui-native-bypass"]
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
    """One contender works at a time. Every training runs from the first round to the last and pauses in between."""
    costs = {name: ask(name, connection, "costs") for name, connection in connections.items()}
    rounds: dict[str, list[float]] = {name: [] for name in connections}
    for number in range(options.rounds + 1):
        for name, connection in connections.items():
            rounds[name].append(ask(name, connection, "go"))
        shown = ", ".join(f"{name} {1e3 * seconds[-1]:.0f} ms" for name, seconds in rounds.items())
        print(f"round {number} of {options.rounds}: {shown}", file=sys.stderr)
    return {  # without the first: what a step does only once is no part of the others
        name: Result(min(seconds[1:]), statistics.median(seconds[1:]), **costs[name])
        for name, seconds in rounds.items()
    }


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
    """Says what a step costs, then takes its turns."""
    try:
        import torch
        from contenders import Task, open_contender

        torch.set_num_threads(options["threads"])
        device = options["device"]
        task = Task(options["batch_size"], options["rank"], options["checkpointing"], device, options["model"])
        train = open_contender(name, task)
        connection.recv()
        connection.send(costs(train, device))
        take_turns(train, options["steps"], options["rounds"], device, connection)
    except EOFError:  # nobody asks any more
        return
    except Exception:
        connection.send(Failure(traceback.format_exc()))


def take_turns(train: Training, steps: int, rounds: int, device: str, connection: Connection) -> None:
    """Trains when told to, and tells the mean seconds of each turn: the first is one step, the others ``steps``."""
    ends = [1 + steps * number for number in range(rounds + 1)]
    done, before, since = 0, 0, 0.0

    def after_a_step(optimizer: Any) -> None:
        nonlocal done, before, since
        done += 1
        if done in ends:
            connection.send((now(device) - since) / (done - before))
            before = done
            if done < ends[-1]:
                connection.recv()
            since = now(device)

    connection.recv()
    since = now(device)
    with after_each_step(after_a_step):
        train(ends[-1])


def now(device: str) -> float:
    """Seconds: of this process at work on the CPU, of the clock when a GPU is done."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def after_each_step(callback: Callable[[Any], object]) -> Iterator[None]:
    """Calls back after every step of whatever optimizer of torch's, with it."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: callback(optimizer))
    try:
        yield
    finally:
        handle.remove()


def costs(train: Training, device: str) -> dict[str, Any]:
    """Of three steps, in two of which the optimizer's state is there: most bytes at once, GFLOP of a step, numbers."""
    import torch

    from stylewright.training.memory import Footprint

    cost, flops, trained = Footprint(), [], []

    def after_a_step(optimizer: Any) -> None:
        flops.append(cost.flops)
        trained.append(sum(each.numel() for group in optimizer.param_groups for each in group["params"]))

    with cost, after_each_step(after_a_step):
        train(3)
    extra_bytes = cost.peak
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(3)
        extra_bytes = torch.cuda.max_memory_allocated() - before
    return {"extra_bytes": extra_bytes, "gflop": (flops[2] - flops[0]) / 2e9, "trained": trained[-1]}


# --------------------------------------------------------------------------------------------------------------------


def show(results: dict[str, Result], options: argparse.Namespace) -> None:
    how = "every block recomputed" if options.checkpointing else "recomputing only where it cannot be switched off"
    print(f"small {options.model}, batch {options.batch_size}, rank {options.rank}, float32, {how}\n")
    print("| | ms a step | median | extra MB | GFLOP | trained |\n| --- | --- | --- | --- | --- | --- |")
    for name, result in results.items():
        seconds = f"{1e3 * result.seconds:.1f} | {1e3 * result.median_seconds:.1f}"
        extra = f"{result.extra_bytes / MEGABYTE:.1f} | {result.gflop:.2f} | {result.trained:,}"
        print(f"| {name} | {seconds} | {extra} |")
    print("\n| ratio of | time | memory |\n| --- | --- | --- |")
    for ours, theirs in RATIOS:
        if ours in results and theirs in results:
            mine, other = results[ours], results[theirs]
            time_ratio, memory_ratio = mine.seconds / other.seconds, mine.extra_bytes / other.extra_bytes
            print(f"| {ours} to {theirs} | {time_ratio:.2f} | {memory_ratio:.2f} |")


if __name__ == "__main__":
    main()
