"""What the trials of ``interruptions.py`` train, in this process and through a server, and how ends are compared."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from package import load_package

load_package()

SIDE, STEPS, SAVE_EVERY = 64, 24, 3
RUNS, LORAS = Path("output/stylewright"), Path("models/loras")


@dataclass
class Stop:
    """One interruption, and what was found after it."""

    after: float  # seconds since the node began
    latency: float  # seconds until it had returned
    reported: int  # last step that was shown
    stored: int  # step of the checkpoint; 0 = none yet
    kept: bool  # no whole step is missing that should be there
    clean: bool  # nothing half written; after kills, when the run has ended
    unchanged: bool  # the model answers as before
    torn: bool = False  # the kill fell into the writing of a file


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


# --------------------------------------------------------------------------------------------------------------------
# In this process


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
