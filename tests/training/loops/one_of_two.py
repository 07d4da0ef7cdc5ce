"""What each of two processes does for ``test_processes.py``: ``python one_of_two.py RANK PORT FOLDER``.

One start for everything, because imports take longer than all that is trained. Results go into the folder.
"""

import importlib.util
import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.clocks import FlowClock
from stylewright.training.data.dataset import Dataset
from stylewright.training.data.prompts import Prompts
from stylewright.training.formats.starting import Start, WholeStart
from stylewright.training.formats.state import save_state
from stylewright.training.loops import iteration
from stylewright.training.loops import train as loop
from stylewright.training.loops.distil import distil
from stylewright.training.loops.distil_config import DistilConfig
from stylewright.training.processes import Processes, group_of_words
from stylewright.training.randomness import generator
from stylewright.training.sharding import Twofold, part_like, sharded, take_over, whole

METHODS = ("lora", "rslora", "dora", "lokr", "loha", "oft")
STEPS = {"dealt out": (2, 4), "cut": (4, 1), "both": (3, 2)}  # batch_size, accumulation
DISTILLED = {"dealt out": (2, 2), "cut": (4, 1)}
WHOLE = {"full": True, "ema_decay": 0.9, "learning_rate": 1e-2}
# Folders of a stopped run, and what is missing in each.
LACKING = {
    "whole lacks": "parts-*",
    "first lacks": "shard-00001*",
    "last lacks": "shard-00002*",
    "whole of another": "",
}
RUN = {"steps": 6, "save_every": 2, "ema_decay": 0.9, "scheduler": "cosine", "clip_norm": 0.05, "caption_dropout": 0.3}


def toys():
    """The network and data of the neighbouring tests."""
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOYS = toys()


def options(name, method="lora", **changes):
    batch_size, accumulation = STEPS[name]
    adapter = AdapterConfig(method=method, rank=4 if method == "oft" else 2)
    return TOYS.toy_config(batch_size=batch_size, accumulation=accumulation, adapter=adapter, **changes)


@contextmanager
def recorded(loop=loop):
    """The gradients of every step, as they are clipped."""
    steps, clip = [], loop.clip_grad_norm_

    def recording(parameters, norm):
        steps.append(torch.cat([whole(parameter.grad).flatten() for parameter in parameters]))
        return clip(parameters, norm)

    loop.clip_grad_norm_ = recording
    try:
        yield steps
    finally:
        loop.clip_grad_norm_ = clip


def gradients(processes, method, name, on=None, folder=None, **changes):
    """Of two steps: in the first one many of an adapter's gradients are zero."""
    config = options(name, method, steps=2, **changes)
    with recorded() as steps:
        loop.train(on or TOYS.ToyDenoiser(), data(), config, run_dir=folder, processes=processes)
    return steps


def in_parts():
    """The network, of which each process has its part."""
    denoiser = TOYS.ToyDenoiser()
    denoiser.module = sharded(denoiser.module, init_device_mesh("cpu", (2,)))
    return denoiser


def data(masked=True):
    return TOYS.toy_dataset(5, masked)


def run(processes, folder, name="dealt out", **changes):
    changes = {**RUN, **changes}
    dropout = changes.pop("caption_dropout")
    toy = data()
    examples = Dataset(toy.examples, toy.null, dropout)
    hooks = {key: changes.pop(key) for key in ("report", "check", "on") if key in changes}
    on = hooks.pop("on", None) or TOYS.ToyDenoiser()
    return loop.train(on, examples, options(name, **changes), run_dir=folder, processes=processes, **hooks)


class Timed(TOYS.ToyDenoiser):
    clock = FlowClock()


def encode(prompts):
    rows = [torch.randn(1, TOYS.CONTEXT, generator=generator(0, prompt)) for prompt in prompts]
    return {"context": torch.cat(rows)}


def in_parts_twice():
    """The network to train in parts, and its frozen copy."""
    mesh, denoiser = init_device_mesh("cpu", (2,)), Timed()
    place = Twofold(lambda module: sharded(module, mesh))
    denoiser.module = place(denoiser.module)
    return {"on": denoiser, "frozen": place.frozen}


def start():
    """A student to begin with, which is no change of nothing."""
    state = {}
    with attached(Timed().module, AdapterConfig(rank=2, targets="all"), family="toy", seed=5) as adapter:
        for name, tensor in adapter.state_dict().items():
            state[name] = torch.randn(tensor.shape, generator=generator(0, name)) / 4
    return Start("start.safetensors", state, tuple(adapter.names), "begins")


def another():
    """All weights of another network, for the same."""
    return WholeStart("another", TOYS.ToyDenoiser(seed=3).module.state_dict())


def distilled(processes, folder, batch_size=4, accumulation=1, check=None, on=None, frozen=None, start=None, **changes):
    """The student's state, and the gradients of student and fake in turn."""
    config = DistilConfig(
        steps=3,
        batch_size=batch_size,
        accumulation=accumulation,
        fake_updates=2,
        null_share=0.5,
        guidance_by_sample=True,
        save_every=1,
        adapter=AdapterConfig(rank=2, targets="all"),
        fake_rank=2,
        **changes,
    )
    size = (TOYS.CHANNELS, TOYS.HEIGHT, TOYS.WIDTH)
    prompts = Prompts(("{circle|star} in {red|blue} style", "a tree"))
    with recorded(iteration) as steps:
        result = distil(
            on or Timed(),
            prompts,
            encode,
            config,
            latent_size=size,
            run_dir=folder,
            check=check,
            processes=processes,
            frozen=frozen,
            start=start,
        )
    return {"gradients": steps, "state": result.adapter_state, "losses": [event.loss for event in result.history]}


def rows(processes):
    """Whether parts of tensors of few and of many rows are those that torch deals out, and whole ones again."""
    mesh, right = init_device_mesh("cpu", (2,)), []
    for count in (1, 2, 5):
        value = torch.arange(3.0 * count).reshape(count, 3)
        like = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])
        part = part_like(like, value.shape, value.dtype)
        take_over(part, value)
        right.append(torch.equal(part.to_local(), distribute_tensor(value, mesh, [Shard(0)]).to_local()))
        right.append(torch.equal(whole(part), value))
    return right


def refused(call, *args, **kwargs):
    """Kind and text of what a call raises."""
    try:
        call(*args, **kwargs)
    except BaseException as error:
        return [type(error).__name__, str(error)]
    return None


class Spoilt(TOYS.ToyDenoiser):
    """A model that answers NaN in its third call."""

    calls = 0

    def __call__(self, *args):
        self.calls += 1
        return super().__call__(*args) * (float("nan") if self.calls == 3 else 1.0)


def at_call(number, error):
    """A hook that raises when it is called for this time; without an error the process dies."""
    calls = 0

    def hook(*_):
        nonlocal calls
        calls += 1
        if calls == number:
            if error is None:
                os._exit(1)
            raise error

    return hook


def everything(processes, folder):
    rank, told = processes.rank, {}
    state = {f"{method} {name}": gradients(processes, method, name) for method in METHODS for name in STEPS}
    result = run(processes, folder / "straight")
    state["straight"], told["losses"] = result.adapter_state, result.losses
    told["samples"] = [event.samples for event in result.history]
    told["path"] = result.path and str(result.path)

    interrupting = at_call(5, KeyboardInterrupt("by hand")) if rank else None
    told["interrupt"] = refused(run, processes, folder / "parts", check=interrupting)
    state["parts"] = run(processes, folder / "parts").adapter_state
    told["report"] = refused(run, processes, folder / "report", report=at_call(2, OSError("the disk is full")))
    told["nan"] = refused(run, processes, folder / "nan", on=Spoilt() if rank else None)
    told["options"] = refused(run, processes, folder / "options", seed=rank, ema_decay=0.5 + rank / 4)
    told["data"] = refused(train, processes, data(masked=rank == 0))
    told["uneven"] = refused(train, processes, data(), batch_size=3, accumulation=1)
    told["of one"] = refused(run, processes, folder / "of one")
    for name, steps in DISTILLED.items():
        state[f"student {name}"] = distilled(processes, folder / f"student {name}", *steps)
    stopping = at_call(2, KeyboardInterrupt()) if rank else None
    told["student"] = refused(distilled, processes, folder / "student", check=stopping)
    state["student"] = distilled(processes, folder / "student")
    parts = Processes(group_of_words(), sharded=True)
    for method, again in product(METHODS, (False, True)):
        where = folder / f"parts-{method}-{again}"
        denoiser = in_parts()
        state[where.name] = gradients(parts, method, "both", denoiser, where, gradient_checkpointing=again)
        told[where.name] = sum(each.to_local().numel() for each in denoiser.module.parameters())
    for name, steps in DISTILLED.items():
        state[f"whole {name}"] = distilled(parts, folder / f"whole {name}", *steps, **WHOLE, **in_parts_twice())
    for optimizer in ("schedule-free", "prodigy"):
        rates = {"optimizer": optimizer, "ema_decay": 0.0, "learning_rate": 1.0, "fake_learning_rate": 1.0}
        call = partial(distilled, parts, folder / optimizer, full=True, **rates, **in_parts_twice())
        told[optimizer] = refused(call) if optimizer == "prodigy" else call()["losses"]
    state["whole start"] = distilled(parts, None, **WHOLE, start=start(), **in_parts_twice())
    state["whole another"] = distilled(parts, None, **WHOLE, start=another(), **in_parts_twice())
    stopping = {"check": at_call(2, KeyboardInterrupt())} if rank else {}
    told["whole"] = refused(distilled, parts, folder / "whole", **WHOLE, **in_parts_twice(), **stopping)
    told["part"] = sum(each.stat().st_size for each in (folder / "whole").glob("parts-*/*"))
    with processes.together():
        if processes.writes:
            shutil.copytree(folder / "whole", folder / "whole stopped")
            shutil.copytree(folder / "whole", folder / "whole stopped before")
            for name, lacking in LACKING.items():
                shutil.copytree(folder / "whole", folder / name, ignore=shutil.ignore_patterns(lacking))
            for shard in (folder / "whole cut").glob("parts-*/*"):
                shutil.copy(shard, folder / "whole of another" / "parts-00000001")
    state["whole"] = distilled(parts, folder / "whole", **WHOLE, **in_parts_twice())
    state["whole from one"] = distilled(parts, folder / "whole of one", **WHOLE, **in_parts_twice())
    for name in LACKING:
        told[name] = refused(distilled, parts, folder / name, **WHOLE, **in_parts_twice())
    told["rows"] = rows(processes)
    told["words"] = [processes.shared(rank), processes.gathered(rank)]
    save_state(folder / f"state-{rank}.safetensors", state)

    lost = {"check": at_call(9, None)} if rank else {}  # last, because nothing can follow
    told["lost"] = refused(run, processes, folder / "lost", **lost)
    (folder / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def train(processes, examples, **changes):
    return loop.train(TOYS.ToyDenoiser(), examples, TOYS.toy_config(**changes), run_dir=None, processes=processes)


def main(rank, port, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    everything(Processes(group_of_words()), Path(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
