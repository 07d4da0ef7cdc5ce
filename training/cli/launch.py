"""What ``accelerate launch`` has begun: several processes of one command, as accelerate's own configuration says."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from ..processes import ALONE, Processes, group_of_words

logger = logging.getLogger(__name__)

# What accelerate tells the processes that it launches.
PRECISION, USES_FSDP = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"
PRECISIONS = {"bf16": "bfloat16", "no": None}  # as our option has it; None = as that says
KINDS = ("MULTI_CPU", "MULTI_GPU", "MULTI_XPU")  # of accelerate's distributed types


@dataclass(frozen=True)
class Launch:
    """The processes of this command, and where this one of them computes."""

    processes: Processes = ALONE
    device: str | None = None  # None = as the options say
    place: Callable[[Any], Any] | None = None  # keeps this process's part of a network; None = all have it whole

    def device_of(self, name: str) -> str:
        """The device that the option ``name`` means here. ValueError for one that all processes would share."""
        from .train import device_of

        if self.device is None or name == "cpu":
            return device_of(name)
        if ":" in name:
            raise ValueError(
                f"Got device={name!r} for {self.processes.count} processes, each of which has a device of its own: "
                "leave it out, or say which are seen with CUDA_VISIBLE_DEVICES"
            )
        return self.device


@contextmanager
def launched() -> Iterator[Launch]:
    """Inside, the processes can reach each other, and all but the first are silent. One that was begun alone is alone.

    ValueError for a way of launching that is not supported.
    """
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if PRECISION in os.environ:  # by accelerate, which may have been meant to begin more
            logger.info("works on 1 process")
        yield Launch()
        return
    launch = _joined()
    processes = launch.processes
    if not processes.writes:
        logging.getLogger(__name__.partition(".training")[0]).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    has = "a part of the model" if processes.sharded else "the whole model"
    logger.info("works on %d processes, each of which has %s and its share of every step", processes.count, has)
    try:
        yield launch
        import torch.distributed as dist

        dist.destroy_process_group()
    except BaseException as error:
        if processes.writes or not processes.all_raise(error):
            raise
        raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 1) from None  # the first one says it


def _joined() -> Launch:
    import torch
    from accelerate import PartialState

    on_cpu = not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()))
    state: Any = PartialState(cpu=on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    if state.distributed_type.value not in KINDS:
        raise ValueError(
            f"accelerate is configured for {state.distributed_type.value}: expected {', '.join(KINDS)}, or FSDP with "
            "fsdp_version 2 (accelerate config)"
        )
    uses_fsdp = os.environ.get(USES_FSDP, "").lower() == "true"
    place = _sharding(state.device.type, state.num_processes) if uses_fsdp else None
    return Launch(Processes(group_of_words(), sharded=uses_fsdp), str(state.device), place)


def _sharding(device: str, count: int) -> Callable[[Any], Any]:
    """As accelerate's FSDP plugin is configured. ValueError for its first version, which flattens weights."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "accelerate is configured for FSDP's first version: expected fsdp_version 2 (--fsdp_version 2)"
        )
    if device == "cpu" and os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true":
        raise ValueError("fsdp_offload_params is on, and all is computed on the CPU: there is nowhere to offload from")
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh

    from ..sharding import sharded

    plugin: Any = FullyShardedDataParallelPlugin()
    mesh = init_device_mesh(device, (count,))
    # Of blocks that answer with views. Nothing here writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    return lambda module: sharded(module, mesh, reshard=plugin.reshard_after_forward, offload=plugin.cpu_offload)


def as_launched(table: dict[str, Any]) -> dict[str, Any]:
    """Options with what accelerate's configuration says where they say nothing. ValueError for what we have not."""
    wanted = os.environ.get(PRECISION, "no")
    if wanted not in PRECISIONS:
        raise ValueError(f"accelerate is configured for {wanted}: expected one of {', '.join(PRECISIONS)}")
    found: dict[str, Any] = {}
    if PRECISIONS[wanted]:
        found["precision"] = PRECISIONS[wanted]
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        found["gradient_checkpointing"] = True
    return found | table
