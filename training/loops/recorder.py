"""What a run tells and keeps: reports, samples, checkpoints, and a last checkpoint when something is raised."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import IncompatibleCheckpoint
from ..formats.parts import TOKEN, load_parts, put_back, room_for_parts, save_parts, taken_out
from ..formats.routing import routing_table, summary_of
from ..processes import ALONE, Processes
from .checkpoint import CHECKPOINT, PARTS, RunDirectory, disk_errors
from .config import RunConfig
from .events import Event, EventLog, bins_of, peak_memory
from .learner import Learner
from .meter import Meter, joined
from .optimizers import learning_rate_of
from .samples import find_samples
from .subject import Subject

logger = logging.getLogger(__name__)

LONGEST_SILENCE = 0.5  # seconds between reports, unless a step takes longer


class Recorder:
    """Keeps a learner's progress in a run's folder; without one, only in memory.

    Of several processes one has the folder. The others have the same history, and do as it does.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        learner: Learner,
        meter: Meter,
        config: RunConfig,
        *,
        subject: Subject,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        """Continues from the folder's checkpoint, or begins with one, so that there is always a state to go back to."""
        self._run, self._learner, self._meter, self._config = run, learner, meter, config
        self._subject, self._device = subject, device
        self._processes, self._count = processes, processes.count
        self._saved: int | None = None  # step of the checkpoint on disk
        self._path = processes.shared(run.path if run else None)
        state = processes.from_first(lambda: run.load(config, subject.identity) if run else None)
        if state:
            state = self._with_parts(state)
            _load(learner, state)
            self._saved = learner.step
            logger.info("continues %s at step %d of %d", self._path, learner.step, config.steps)
            _say_on_how_many(state.get("processes", 1), processes.count)
        with processes.together():
            self._log = EventLog(run.events if run else None, learner.step)
            if run:
                run.clear(f"{PARTS}-*", but=state.get(PARTS) if state else None)  # of a save that failed
                size = sum(p.numel() * p.element_size() for p in learner.all_parameters)
                run.require_space(size, "" if subject.whole else ", or lower adapter.rank")
                run.save_config(config)
        self._save_adapter()  # the process before may have been killed between checkpoint and adapter
        self.save()
        with processes.together():
            if run and learner.step == 0:
                run.adapter.unlink()  # it does nothing yet; now it is known that it can be written
        self._last_report = time.monotonic()

    @property
    def history(self) -> list[Event]:
        return list(self._log.events)

    def catch_up(self, sample: Callable[[int], Tensor | None] | None) -> None:
        """Draws the pictures of a continued run's last step, where an interrupt came before they were there."""
        step, config = self._learner.step, self._config
        if sample is None or step == 0 or config.sample_every == 0 or step % config.sample_every:
            return
        run = self._run
        if self._processes.shared(
            run is not None and step not in find_samples(run.samples, config.sample_prompts, until=step)
        ):
            self._draw(sample)

    def observe(self, report: Callable[[Event], None] | None, sample: Callable[[int], Tensor | None] | None) -> None:
        """After a step: whatever is due of samples, the report, and the checkpoint."""
        step, config = self._learner.step, self._config
        due = sample if config.sample_every > 0 and (step % config.sample_every == 0 or step == config.steps) else None
        saving = step == config.steps or (config.save_every > 0 and step % config.save_every == 0)
        late = self._processes.shared(time.monotonic() - self._last_report > LONGEST_SILENCE)
        if not (due is not None or saving or late or step % config.report_every == 0):
            return
        event = self._event(None if due is None else self._draw(due))
        if saving:
            self.save()
        with self._processes.together():
            if event is not None and report is not None and self._processes.writes:
                report(event)

    def _draw(self, sample: Callable[[int], Tensor | None]) -> Tensor | None:
        with self._processes.passing():
            if not (self._processes.writes or self._processes.sharded):
                return None  # whole models draw in one process
            with self._learner.evaluated():
                images = sample(self._learner.step)
            if self._run and images is not None:
                self._run.save_images(self._learner.step, images, self._config.sample_prompts)
        return images

    def _event(self, images: Tensor | None = None) -> Event | None:
        """Reads the meter and logs what it says; None if no step was completed since the last time."""
        learner, processes = self._learner, self._processes
        with processes.together():
            reading = self._meter.read(learner.step)
        if reading is None:
            return None
        reading = joined(processes.gathered(reading))
        learner.losses += reading.by_step
        event = Event(
            step=learner.step,
            steps=self._config.steps,
            samples=learner.step * self._config.samples_a_step,
            loss=reading.losses.mean().item(),
            loss_by_bin=bins_of(reading.log_snr, reading.losses),
            learning_rate=learning_rate_of(learner.optimizer),
            seconds=learner.seconds,
            peak_bytes=peak_memory(self._device),
            routing=summary_of(self._routing()),
            others=reading.others,
            images=images,
        )
        with processes.together():
            self._log.append(event)
        self._last_report = time.monotonic()
        return event

    def save(self) -> None:
        """The checkpoint, and the adapter as it is now. The losses so far must have been read. All processes do it."""
        if self._path is None or self._saved == self._learner.step:
            return
        state, parts = taken_out({**self._learner.state_dict(), "processes": self._count})
        if parts:
            state |= self._save_parts(parts)
        with self._processes.together():
            if self._run:
                self._run.save(state, self._config, self._subject.identity)
        self._saved = self._learner.step
        self._save_adapter()

    def _save_parts(self, parts: dict[str, Tensor]) -> dict[str, Any]:
        """Those of what learns that each process has, in a folder of their own: which it is, for the checkpoint."""
        assert self._path is not None, "only what is kept is saved"
        name = f"{PARTS}-{self._learner.step:08}"
        token = self._processes.shared(secrets.randbits(62))
        with self._processes.together():
            if self._run:
                self._run.clear(name)
        with self._processes.together(), disk_errors(self._path / name, self._path / CHECKPOINT):
            save_parts(self._path / name, parts, token, self._processes.words)
        return {PARTS: name, TOKEN: token}

    def _with_parts(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A checkpoint's state with this process's parts of what was saved in parts."""
        if self._path is None or PARTS not in state:
            return state
        folder = self._path / state[PARTS]
        try:
            with self._processes.together():
                parts = room_for_parts(folder, state, self._learner.parameters[0])
            with self._processes.together():  # loading waits for the others, and then each looks at what it has
                load_parts(folder, parts, state[TOKEN], self._processes.words)
            return put_back(state, parts)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise IncompatibleCheckpoint(
                f"{folder}, a part of the checkpoint beside it, cannot be read ({error}). Every process needs this "
                "folder, on a disk that all of them see. Restore it, or begin a new run in another folder."
            ) from error

    def _save_adapter(self) -> None:
        learner = self._learner
        if self._path is None:
            return
        state = learner.result(kept=self._run is not None) if self._run or learner.in_parts else {}
        with self._processes.together():
            if self._run:
                about = replace(self._subject.about, steps=learner.step, routing=self._routing())
                if (whole := self._subject.whole) is None:
                    self._run.save_adapter(state, about, self._subject.weights)
                else:
                    self._run.save_whole(whole.as_stored(state), about)

    def _routing(self) -> dict[str, Any]:
        """What the routers do, where there are any, in the last steps of this process."""
        meter = self._learner.adapter.routing
        return {} if meter is None else routing_table(meter.read())

    @contextmanager
    def saving_on_exceptions(self) -> Iterator[None]:
        """Whatever is raised inside, ComfyUI's interrupt too: the last complete step is saved before it goes on."""
        try:
            yield
        except BaseException as error:
            if not self._processes.all_raise(error):
                self._processes = ALONE  # the others do not come here, or not at the same step
            self._save_what_is_sound(error)
            raise

    def _save_what_is_sound(self, error: BaseException) -> None:
        if not self._learner.whole:
            return
        if self._learner.in_parts and self._processes.count < self._count:
            said = "%s. The last checkpoint is that of step %s, for only all processes can save"
            logger.error(said, str(error) or type(error).__name__, self._saved)
            return
        try:
            self._event()
            self.save()
        except Exception:  # the one under way matters more, and the checkpoint before is intact
            logger.exception("The checkpoint of step %s is the last one of this run.", self._saved)


def _load(learner: Learner, state: Mapping[str, Any]) -> None:
    try:
        learner.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise IncompatibleCheckpoint(f"The checkpoint belongs to another model: {error}.") from error


def _say_on_how_many(before: int, now: int) -> None:
    if before != now:
        logger.warning(
            "the checkpoint is of a run on %d processes, and it continues on %d: with the same samples in every step, "
            "but sums in another order, so that the result is equal but for rounding, and not bit for bit",
            before,
            now,
        )
