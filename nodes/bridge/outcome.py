"""What becomes of a run inside ComfyUI: its adapter in models/loras, also where it is stopped, and a node's results."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...training.errors import TrainingError
from ...training.loops.checkpoint import RunDirectory
from ...training.loops.config import RunConfig
from ...training.loops.events import Event
from ...training.loops.samples import find_samples
from .adapters import AdapterTensors, read_tensors
from .previews import TrainingProgress
from .publishing import publish, published, steps_of
from .runs import Choice, Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedAdapter:
    tensors: AdapterTensors
    losses: list[float]  # mean of each optimizer step
    path: Path
    run: Path  # its folder
    samples: dict[int, list[Path]]  # sample pictures by step, one a prompt; empty = none were asked for
    ui: dict[str, list] | None  # for the node's ``ui`` output


def as_it_is(choice: Choice, config: RunConfig, progress: TrainingProgress) -> TrainedAdapter:
    """The adapter of a run that is not trained now."""
    run, stored = choice.run, choice.stored
    assert run is not None and stored is not None, "there is one, or it would be trained"
    path = published(run.stem, stored.step)
    if path is None:
        finished = stored.step == stored.config["steps"]
        path = publish(run.directory.adapter, run.stem, finished=finished)
    progress.recalled(run.directory, config.sample_prompts, stored.step)
    progress.finished(f"{stored.step} steps, {path.name}")
    samples = find_samples(run.directory.samples, config.sample_prompts, until=stored.step)
    return TrainedAdapter(read_tensors(path), run.directory.losses(), path, run.folder, samples, progress.ui())


def reporter(
    run: Run, config: RunConfig, save_intermediate: bool, progress: TrainingProgress
) -> Callable[[Event], None]:
    """Publishes what was just saved, where the user wants that, and passes the report on."""
    every = config.save_every if save_intermediate else 0

    def report(event: Event) -> None:
        if every and event.step % every == 0 and event.step < event.steps:
            publish(run.directory.adapter, run.stem, finished=False)
        progress.report(event)

    return report


@contextmanager
def kept(run: RunDirectory) -> Iterator[None]:
    """Says that nothing is lost where the finished adapter cannot be copied."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"the adapter is trained and could not be saved in models/loras ({error.strerror}): make room, and queue "
            f"again, which trains nothing anew. It is also here: {run.adapter}"
        ) from error


@contextmanager
def published_if_stopped(run: Run, steps: int) -> Iterator[None]:
    """Whatever is raised inside, the adapter of the last complete step is in models/loras before it goes on."""
    try:
        yield
    except BaseException:
        step = steps_of(run.directory.adapter)
        if step:
            try:
                path = publish(run.directory.adapter, run.stem, finished=step == steps)
                logger.warning("stopped at step %d: %s is the adapter so far, and the run can be continued", step, path)
            except OSError:  # the one under way matters more
                logger.exception("the adapter so far stays in %s", run.folder)
        raise
