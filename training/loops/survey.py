"""What a run will take of memory and time, from a few small passes through the very model, adapter and options.

A pass at a thirty-second of the size tells what each block keeps; see :mod:`.course`. The optimiser's part is
measured on the adapter itself. Nothing is left of it: the adapter of a survey is thrown away with it.
"""

import time
from dataclasses import dataclass

import torch

from ..adapters.attach import Adapter
from ..data.dataset import Dataset
from ..gradients import repeated_blocks
from ..memory import Footprint, is_out_of_memory
from .config import TrainConfig
from .course import Course, Point, foretold, order_of_recomputing, peak
from .optimizers import OPTIMIZERS
from .probe import Bench, gradients_put_back, measured, run
from .saving import ALL, Saving

EASY = 16  # tokens a side of a batch that is small enough to be measured as it is
EVERYTHING = Saving(frozenset({ALL}))


@dataclass(frozen=True)
class AdapterCost:
    """Bytes that last over a step, and the update itself."""

    weights: int
    states: int  # of the optimiser and the moving average
    update: int  # the most during an update, on top
    seconds: float

    def resident(self, config: TrainConfig) -> int:
        """Bytes there are while a batch passes; gradients of an only batch come into being during its way back."""
        return self.weights + self.states + (self.weights if config.accumulation > 1 else 0)


@dataclass(frozen=True)
class Survey:
    """What was measured, and what follows for any size and setting."""

    kept: tuple[Point, ...]
    recomputed: tuple[Point, ...]
    adapter: AdapterCost
    largest: tuple[int, int]  # of the data's latents (h, w)
    areas: tuple[int, ...]  # latent positions of every picture
    blocks: int
    correction: float = 1.0  # of foretold activations, by those of a rehearsal

    def courses(self, batch: int, area: float) -> tuple[Course, Course]:
        """A batch with everything kept, and with every block recomputed."""
        return foretold(self.kept, batch, area), foretold(self.recomputed, batch, area)

    def order(self, batch: int, area: float) -> list[int]:
        return order_of_recomputing(*self.courses(batch, area))

    def activations(self, batch: int, area: float, saving: Saving) -> float:
        """Bytes at most beyond the model and what lasts of the adapter."""
        kept, recomputed = self.courses(batch, area)
        chosen = set(kept.places) if ALL in saving.recomputed else saving.recomputed
        return self.correction * peak(kept, recomputed, chosen, offload=saving.offload)

    def flops(self, batch: int, area: float, saving: Saving) -> float:
        """Of both passes of a batch."""
        kept, recomputed = self.courses(batch, area)
        every = sum(call.flops for call in kept.calls) or 1.0
        chosen = sum(call.flops for call in kept.calls if ALL in saving.recomputed or call.place in saving.recomputed)
        # Not every block is computed again to its end, and those before the first adapter not at all.
        return kept.flops + (recomputed.flops - kept.flops) * chosen / every


@dataclass(frozen=True)
class Rehearsal:
    """One batch as it will be trained."""

    saving: Saving
    seconds: float
    bytes: int  # beyond what was there before


def surveyed(bench: Bench, dataset: Dataset, latents_per_token: int, room: float | None, smallest: int = 1) -> Survey:
    """Measures. ``room`` is how many bytes may be used for it (None = not known), ``smallest`` a side that works."""
    batch, largest = bench.config.batch_size, _largest(dataset)
    can_recompute = bool(repeated_blocks(bench.denoiser.module))
    kept, recomputed = [], []
    for shape in probes(batch, largest, latents_per_token, smallest):
        tokens = shape[1] * shape[2]
        again = measured(bench, shape, EVERYTHING if can_recompute else Saving())
        recomputed.append(Point(shape[0], tokens, again))
        if kept and room is not None and _expected(kept[-1], shape) > room:
            continue
        kept.append(Point(shape[0], tokens, measured(bench, shape, Saving()) if can_recompute else again))
    return Survey(
        tuple(kept),
        tuple(recomputed),
        adapter_cost(bench.adapter, bench.config, bench.device),
        largest,
        tuple(example.latent.shape[-2] * example.latent.shape[-1] for example in dataset.examples),
        len(repeated_blocks(bench.denoiser.module)),
    )


def probes(
    batch: int, largest: tuple[int, int], latents_per_token: int, smallest: int = 1
) -> list[tuple[int, int, int]]:
    """Sizes (b, h, w) to measure at: the size itself where that is small, else three of up to a sixteenth of it.

    Sides are multiples of four tokens, which every UNet can halve thrice. All have the batch size of the run: a batch
    of one takes other operations.
    """
    unit = 4 * max(1, round(latents_per_token**0.5))
    if batch * largest[0] * largest[1] <= EASY**2 * latents_per_token:
        return [(batch, *largest)]
    side = int((largest[0] * largest[1]) ** 0.5) // unit
    least = -(-smallest // unit)
    most = max(least + 2, side // 4)
    sides = [unit * max(least, most // 2), unit * max(least + 1, 3 * most // 4), unit * most]
    return [(batch, side, side) for side in sides]


def _expected(last: Point, shape: tuple[int, int, int]) -> float:
    """Bytes of a pass at another size, by the rule of three and half as many again."""
    course = last.course
    done = course.start + sum(call.rise for call in course.calls) + max(float(c.forward.max()) for c in course.calls)
    return 1.5 * done * shape[0] * shape[1] * shape[2] / (last.batch * last.tokens)


def adapter_cost(adapter: Adapter, config: TrainConfig, device: torch.device) -> AdapterCost:
    """Bytes and time of what moves the adapter, from two updates of an adapter that nobody needs afterwards."""
    parameters = adapter.parameters()
    weights = sum(parameter.nbytes for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    try:
        with Footprint(device) as cost:
            optimizer = OPTIMIZERS[config.optimizer](
                [{"params": parameters}], config.learning_rate, config.weight_decay, config.warm_up
            )
            optimizer.step()
            states = cost.lap().live
            optimizer.step()
            update = cost.lap().peak - states
        since = now(device)
        optimizer.step()
        seconds = now(device) - since
    finally:
        for parameter in parameters:
            parameter.grad = None
    return AdapterCost(weights, states + (weights if config.ema_decay else 0), update, seconds)


def rehearse(bench: Bench, shape: tuple[int, int, int], saving: Saving) -> Rehearsal:
    """Runs one batch at its full size; where there is no memory for it, with the next cheaper setting."""
    module, device = bench.denoiser.module, bench.device
    cheaper = saving.cheaper(module)
    try:
        with gradients_put_back(bench), saving.applied(module, device):
            taken = _bytes_of_first(bench, shape)  # in which kernels are loaded and chosen, too
            since = now(device)
            run(bench, shape)
            return Rehearsal(saving, now(device) - since, taken)
    except (RuntimeError, MemoryError) as error:
        if cheaper is None or not is_out_of_memory(error):
            raise
    return rehearse(bench, shape, cheaper)


def _largest(dataset: Dataset) -> tuple[int, int]:
    latent = max((example.latent for example in dataset.examples), key=lambda latent: latent.numel())
    return latent.shape[-2], latent.shape[-1]


def _bytes_of_first(bench: Bench, shape: tuple[int, int, int]) -> int:
    """Of one pass: as the allocator counts them, buffers of kernels included, or else as tensors."""
    device = bench.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(bench, shape)
        return torch.cuda.max_memory_allocated(device) - before
    with Footprint(device) as cost:
        run(bench, shape)
    return cost.peak


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
