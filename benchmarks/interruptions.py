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
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfyui import open_comfyui, why_absent
from package import load_package

load_package()

SIDE, STEPS, SAVE_EVERY = 64, 24, 3
CANCEL, SERVER, KILL = "cancel", "server cancel", "kill"
CHAIN = 6  # stops of one run at most
RUNS, LORAS = Path("output/stylewright"), Path("models/loras")


@dataclass
class Stop:
    """One interruption, and what was found after it."""

    after: float  # seconds since the node began
    latency: float  # seconds until it had returned
    reported: int  # last step that was shown
    stored: int  # step of the checkpoint; 0 = none yet
    kept: bool  # no whole step is missing that should be there
    clean: bool  # nothing half written
    unchanged: bool | None  # the model answers as before; None = the process is gone


class Bench:
    """A ComfyUI base folder with runs in it, and the lines of results."""

    def __init__(self, out: Path, kind: str) -> None:
        self.base, self.lines = out / kind.replace(" ", "-"), out / "interruptions.jsonl"
        self.base.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        """Of a server."""
        return self.base / "server.log"

    def done(self, kind: str) -> tuple[int, int]:
        """Runs and stops of a kind that are in the file."""
        runs = [line for line in read(self.lines) if line["kind"] == kind]
        return len(runs), sum(len(run["stops"]) for run in runs)

    def write(self, kind: str, seed: int, stops: Sequence[Stop], equal: bool) -> None:
        line = {"kind": kind, "seed": seed, "comfyui": version(), "equal": equal, "stops": [vars(s) for s in stops]}
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{stop.stored}/{STEPS}" for stop in stops)
        print(f"{time.strftime('%H:%M:%S')} {kind} {seed}: stopped at {shown or 'none'}; equal: {equal}", flush=True)

    def end_of(self, name: str) -> Any:
        """All that a finished run leaves and goes on from."""
        from stylewright.training.formats.contents import read_adapter
        from stylewright.training.formats.state import load_state

        learner = load_state(self.base / RUNS / f"{name}_00001" / "checkpoint.safetensors")["learner"]
        del learner["seconds"]
        file = read_adapter(self.base / LORAS / f"{name}_00001_.safetensors")
        return numbers({"header": dict(file.header), "tensors": dict(file.tensors), "learner": learner})

    def stored(self, name: str) -> int:
        """Step of a run's checkpoint; 0 where there is none. Raises where it cannot be read."""
        from stylewright.training.loops.checkpoint import RunDirectory

        found = RunDirectory(self.base / RUNS / f"{name}_00001").stored()
        return found.step if found else 0

    def leftovers(self) -> list[Path]:
        return [path for folder in (RUNS, LORAS) for path in (self.base / folder).rglob(".*.tmp")]

    def forget(self, name: str) -> None:
        """Clears a run away, for thousands of files make ComfyUI slow."""
        shutil.rmtree(self.base / RUNS / f"{name}_00001", ignore_errors=True)
        for path in (self.base / LORAS).glob(f"{name}_00001_*"):
            path.unlink()


def numbers(value: Any) -> Any:
    """A nested value with its tensors as plain numbers, so that == compares bits."""
    import torch

    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items()}
    return [numbers(part) for part in value] if isinstance(value, list | tuple) else value


def version() -> str:
    from comfyui import comfyui_path

    text = (comfyui_path() / "comfyui_version.py").read_text(encoding="utf-8")
    return text.split('"')[1]


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


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


class Steps:
    """Counts whole steps, at the one place where a step becomes whole."""

    def __init__(self) -> None:
        self.whole = 0


def trained(embedded: Any, name: str, steps: Steps | None = None) -> None:
    """The job of all trials, as the node asks for it."""
    import torch

    from stylewright.nodes.bridge.sampling import Brush
    from stylewright.nodes.bridge.training import Job, Sockets, train_adapter
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.data.items import items_from_memory
    from stylewright.training.loops.config import TrainConfig
    from stylewright.training.loops.learner import Learner

    config = TrainConfig(
        steps=STEPS,
        batch_size=1,
        accumulation=2,
        learning_rate=2e-3,
        resolution=SIDE,
        save_every=SAVE_EVERY,
        sample_every=8,
        sample_prompts=("house",),
        style_phrase="<v0>",
        adapter=AdapterConfig(rank=4),
    )
    pictures = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    items = items_from_memory(pictures, ["star", "heart"])
    job = Job(items, "content", config, name, Brush(steps=2), save_intermediate=True, keep_checkpoints=1000)
    updating = Learner.updating

    @contextmanager
    def counted(learner: Learner) -> Iterator[None]:
        with updating(learner):
            yield
        if steps:
            steps.whole = learner.step

    Learner.updating = counted
    try:
        with torch.inference_mode():
            train_adapter(Sockets(embedded.model, embedded.clip, embedded.vae), job)
    finally:
        Learner.updating = updating


def base_answer(embedded: Any) -> list[float]:
    """One prediction of the model as it is."""
    import torch

    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session

    prompts = PromptTable(embedded.clip)
    with torch.inference_mode(), training_session(embedded.model), torch.no_grad():
        x_t = torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(9))
        answer = ComfyDenoiser(embedded.model, prompts)(x_t, torch.tensor([-2.0]), prompts.encode(["star"]))
    return answer.flatten().tolist()


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


def require_success(heard: Any) -> None:
    if heard.outcome != "success":
        raise RuntimeError(
            f"the run ended with {heard.outcome or 'a broken connection'}: {json.dumps(heard.problem)[:2000]}"
        )


LOADER, REFERENCE, DATASET, TRAINER = "1", "2", "3", "4"


def job(server: Any, name: str) -> dict[str, Any]:
    """The prompt of all trials but for the file name."""
    trainer = server.defaults("StyleFriendlySNRTrainer") | {
        "model": [LOADER, 0],
        "clip": [LOADER, 1],
        "vae": [LOADER, 2],
        "dataset": [DATASET, 0],
        "steps": STEPS,
        "learning_rate": 2e-3,
        "rank": 4,
        "batch_size": 1,
        "accumulation": 2,
        "precision": "float32",
        "gradient_checkpointing": False,
        "file_name": name,
        "sample_prompt": "house",
        "sample_every": 8,
        "sample_steps": 2,
        "save_every": SAVE_EVERY,
        "save_intermediate": True,
        "keep_checkpoints": 1000,
    }
    reference = server.defaults("StylewrightReference") | {"count": 2}
    dataset = server.defaults("StyleDataset") | {
        "images": [REFERENCE, 0],
        "captions": [REFERENCE, 1],
        "style_phrase": [REFERENCE, 2],
        "resolution": SIDE,
    }
    return {
        LOADER: {"class_type": "StylewrightEmbeddedModel", "inputs": {}},
        REFERENCE: {"class_type": "StylewrightReference", "inputs": reference},
        DATASET: {"class_type": "StyleDataset", "inputs": dataset},
        TRAINER: {"class_type": "StyleFriendlySNRTrainer", "inputs": trainer},
    }


def base_picture(bench: Bench, server: Any) -> bytes:
    """What the model of the same loader node draws without an adapter. Nothing of it is cached: see --cache-classic."""
    from PIL import Image

    prompt = {
        LOADER: {"class_type": "StylewrightEmbeddedModel", "inputs": {}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": [LOADER, 1], "text": "star"}},
        "6": {"class_type": "EmptySD3LatentImage", "inputs": {"width": SIDE, "height": SIDE, "batch_size": 1}},
        "7": {
            "class_type": "KSampler",
            "inputs": {
                "model": [LOADER, 0],
                "positive": ["5", 0],
                "negative": ["5", 0],
                "latent_image": ["6", 0],
                "seed": 1,
                "steps": 2,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": [LOADER, 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "base/picture"}},
    }
    folder = bench.base / "output" / "base"
    shutil.rmtree(folder, ignore_errors=True)
    require_success(server.run(prompt, "7"))
    (file,) = folder.glob("*.png")
    return Image.open(file).tobytes()


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
