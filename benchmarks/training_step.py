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
from collections.abc import Callable, Iterator
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

Training = Callable[[int], object]  # optimizer steps -> whatever


@dataclass(frozen=True)
class Result:
    """What was measured of one contender."""

    seconds: float  # of an optimizer step: least of the rounds' means, which others' work disturbs least
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
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps in each turn")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
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
        train = open_contender(name, Task(options["batch_size"], options["rank"], options["checkpointing"], device))
        connection.recv()
        connection.send({"extra_bytes": extra_bytes(train, device), "gflop": gflop(train)})
        take_turns(train, options["steps"], options["rounds"], device, connection)
    except EOFError:  # nobody asks any more
        return
    except Exception:
        connection.send(Failure(traceback.format_exc()))


def take_turns(train: Training, steps: int, rounds: int, device: str, connection: Connection) -> None:
    """Trains when told to, and tells the mean seconds of each turn: the first is one step, the others ``steps``."""
    ends = [1 + steps * number for number in range(rounds + 1)]
    done, before, since = 0, 0, 0.0

    def after_a_step() -> None:
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
def after_each_step(callback: Callable[[], object]) -> Iterator[None]:
    """Calls back after every step of whatever optimizer of torch's."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: callback())
    try:
        yield
    finally:
        handle.remove()


def extra_bytes(train: Training, device: str) -> int:
    """The most that training makes at once, in three steps: the optimizer's state is there in two of them."""
    import torch
    from peak_bytes import PeakBytes

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(3)
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as memory:
        train(3)
    return memory.peak


def gflop(train: Training) -> float:
    """Of one step, as torch counts the products; elementwise work is not in it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    attention = {  # torch counts the kernels for GPUs only
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *rest, out_shape=None, **more: sdpa_flop_count(q, k, v)
        ),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda gradient, q, k, v, *rest, out_shape=None, **more: sdpa_backward_flop_count(gradient, q, k, v)
        ),
    }
    counter, counts = FlopCounterMode(display=False, custom_mapping=attention), []
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
