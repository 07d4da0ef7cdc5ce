"""Two processes against one, of one thread each on one machine's processors: equal losses, and how much faster.

The embedded model learns four prompts. Rounds of one process (the other waits) and of two take turns. Throughput
efficiency is the time of a step of one process over twice that of two: 1 = twice as fast. On a shared machine the
time of the clock says who else was there, too; processor time says what was computed and copied.

    OMP_NUM_THREADS=1 python benchmarks/processes.py
"""

# ruff: noqa: E402 (the package comes from the folder above, wherever it is)

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from package import load_package

load_package()

from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.data.dataset import Dataset, Example
from stylewright.training.hosts.embedded import load_embedded
from stylewright.training.hosts.host import Host
from stylewright.training.loops.config import TrainConfig
from stylewright.training.loops.train import train
from stylewright.training.processes import ALONE, Processes, group_of_words
from stylewright.training.randomness import generator

PROMPTS = ("a star", "a tree", "a heart", "a house")


class Timed(Processes):
    """Processes that know how long they talked and waited."""

    spent = 0.0

    def _timed(self, call, *args):
        begin = time.perf_counter()
        try:
            return call(*args)
        finally:
            self.spent += time.perf_counter() - begin

    def sum_gradients(self, parameters, divisor=1):
        self._timed(super().sum_gradients, parameters, divisor)

    def _first_of(self, error):
        return self._timed(super()._first_of, error)

    def shared(self, value):
        return self._timed(super().shared, value)


@dataclass
class Clock:
    """The beginnings of steps, by the clock and by processor time."""

    walls: list[float] = field(default_factory=list)
    works: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        self.walls.append(time.perf_counter())
        self.works.append(time.process_time())


def dataset_of(host: Host, side: int) -> Dataset:
    draw = generator(0, "latents")
    rows = [host.encode_prompts([prompt]) for prompt in PROMPTS]
    latents = [torch.randn(host.latent_channels, side, side, generator=draw) for _ in PROMPTS]
    parts = zip(PROMPTS, latents, rows, strict=True)
    return Dataset([Example(name, latent, row, None, name) for name, latent, row in parts], None)


def one_round(host: Host, data: Dataset, options: argparse.Namespace, processes: Processes) -> dict:
    clock = Clock()
    config = TrainConfig(
        steps=options.steps + 1, batch_size=options.batch, accumulation=1, adapter=AdapterConfig(rank=options.rank)
    )
    talked = processes.spent if isinstance(processes, Timed) else 0.0
    result = train(host.denoiser, data, config, run_dir=None, check=clock, processes=processes)
    talked = processes.spent - talked if isinstance(processes, Timed) else 0.0
    wall, work = (statistics.median(b - a for a, b in zip(t[1:], t[2:])) for t in (clock.walls, clock.works))  # noqa: B905
    return {"wall": wall, "work": work, "talked": talked / config.steps, "losses": result.losses}


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{options.port}", rank=rank, world_size=2)
    both = Timed(group_of_words())
    host = load_embedded()
    data = dataset_of(host, options.side)
    rounds: list[dict] = []
    for number in range(options.rounds + 1):
        both.shared(None)
        one = one_round(host, data, options, ALONE) if rank == 0 else {}
        both.shared(None)
        two = one_round(host, data, options, both)
        works = both.gathered(two["work"])
        if rank == 0 and number:  # the first round warms up
            rounds.append({"one": one, "two": two, "work of two": sum(works)})
    if rank == 0:
        print(json.dumps(summary(rounds, options), indent=2))
    dist.destroy_process_group()


def summary(rounds: list[dict], options: argparse.Namespace) -> dict:
    def median(read) -> float:
        return round(statistics.median(map(read, rounds)), 4)

    apart = max(abs(a - b) / a for r in rounds for a, b in zip(r["one"]["losses"], r["two"]["losses"], strict=True))
    return {
        "options": {name: getattr(options, name) for name in ("batch", "side", "rank", "steps", "rounds")},
        "largest relative difference of a step's loss": apart,
        "ms a step, one process": median(lambda r: 1e3 * r["one"]["wall"]),
        "ms a step, two processes": median(lambda r: 1e3 * r["two"]["wall"]),
        "throughput efficiency by the clock": median(lambda r: r["one"]["wall"] / (2 * r["two"]["wall"])),
        "throughput efficiency by processor time": median(lambda r: r["one"]["work"] / r["work of two"]),
        "share of a step of two that the first process talks and waits": median(
            lambda r: r["two"]["talked"] / r["two"]["wall"]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, of both processes together")
    parser.add_argument("--side", type=int, default=16, help="of the latents")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.port:
        worker(options)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--port", str(port)]
    started = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
    sys.exit(max(process.wait() for process in started))


if __name__ == "__main__":
    main()
