"""What a node shows while it works: ComfyUI's progress bar, and the panel of the page."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_execution.graph_utils import ExecutionBlocker

from ...training.loops.checkpoint import RunDirectory
from ...training.loops.events import Event, read_events
from ...training.loops.samples import find_samples
from .board import BOARD, UI, Address, RunState
from .files import shown_subfolder
from .session import raise_if_interrupted

MOST_PICTURES = 60  # steps whose pictures the panel lists


class TrainingProgress:
    """Tells ComfyUI of a run, and the run of ComfyUI's interrupt."""

    def __init__(self, steps: int, address: Address | None, first: str = "before") -> None:
        """``address``: of the node; None outside a server, where there is nobody to tell. ``first``: what the sample
        pictures of step 0 are called.
        """
        self._first = first
        self._bar = comfy.utils.ProgressBar(steps, node_id=address.node_id if address else None)
        self._state = RunState(address.node if address else "", address.workflow if address else None, steps)
        self._told = address is not None
        self._run: RunDirectory | None = None
        self._prompts: Sequence[str] = ()
        if self._told:
            BOARD.open(self._state)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a run: says how it ended where something is raised."""
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            step = self._state.step
            kept = f"Stopped after step {step}: what it has learned is saved. Queue again to continue." if step else ""
            self._show("stopped", kept or "Stopped before the first step.")
            raise
        except Exception as error:
            self._show("failed", str(error).splitlines()[0][:300] if str(error) else type(error).__name__)
            raise

    def encoded(self, done: int, total: int) -> None:
        """A picture or caption of the dataset was encoded."""
        self._show("preparing", f"encoding {done} of {total}", at_once=done == total)
        raise_if_interrupted()

    def planned(self, sentence: str) -> None:
        """What the run will need of memory."""
        self._state.plan = sentence
        self._show()

    def noted(self, note: str) -> None:
        """Something that the user should know and that does not stop the run."""
        self._state.notes.append(note)
        self._show()

    def opened(self, run: RunDirectory, prompts: Sequence[str], window: float | None = None) -> None:
        """Training begins. ``prompts`` of the sample pictures; ``window``: log_snr below which style is decided."""
        self._run, self._prompts, self._state.window = run, prompts, window
        self._show("preparing", "")

    def taught(self, done: int, steps: int) -> None:
        """The teacher has answered the batches of so many steps."""
        self._show("preparing", f"the teacher has answered {done} of {steps} steps", at_once=done == steps)
        raise_if_interrupted()

    def drawing(self, step: int) -> None:
        """Sample pictures are drawn after ``step``."""
        self._show("drawing", "the pictures before training" if step == 0 else f"pictures of step {step}")
        raise_if_interrupted()

    def drawn(self, step: int) -> None:
        """Sample pictures of ``step`` are in the run's folder."""
        self._state.pictures = self._pictures(step)
        self._show()

    def report(self, event: Event) -> None:
        state = self._state
        if not state.points:  # of sessions before this one
            self._recall(event.step - 1)
        state.add(event)
        if event.images is not None:
            state.pictures = self._pictures(event.step)
        self._show("training", "", at_once=event.images is not None or event.step == event.steps)
        self._bar.update_absolute(event.step, event.steps)
        raise_if_interrupted()

    def recalled(self, run: RunDirectory, prompts: Sequence[str], step: int) -> None:
        """Nothing is trained: what the run was like up to ``step``."""
        self._run, self._prompts = run, prompts
        self._recall(step)

    def _recall(self, step: int) -> None:
        if self._run:
            for event in read_events(self._run.events, step):
                self._state.add(event)
            self._state.pictures = self._pictures(step)

    def finished(self, text: str) -> None:
        self._show("finished", text)

    def ui(self) -> dict[str, list] | None:
        """For the node's ``ui`` output: what the panel shows at the end."""
        return {UI: [self._state.whole()]} if self._told else None

    def _show(self, phase: str | None = None, text: str | None = None, *, at_once: bool = True) -> None:
        self._state.phase = self._state.phase if phase is None else phase
        self._state.text = self._state.text if text is None else text
        if self._told:
            BOARD.show(self._state, at_once=at_once)

    def _pictures(self, until: int) -> dict:
        """Where the page finds the sample pictures of this run so far."""
        if not (self._told and self._run and self._prompts):
            return {}
        found = find_samples(self._run.samples, self._prompts, until=until)
        steps = list(found) if len(found) <= MOST_PICTURES else [*list(found)[:1], *list(found)[1 - MOST_PICTURES :]]
        return {
            "subfolder": shown_subfolder(self._run.samples),
            "prompts": list(self._prompts),
            "first": self._first,
            "steps": [[step, _stamp(found[step][0]), [path.name for path in found[step]]] for step in steps],
        }


def _stamp(path: Path) -> int:
    """Milliseconds, for a page to tell a new picture from an older one of the same name."""
    return path.stat().st_mtime_ns // 1_000_000


def show_text(node_id: str | None, text: str) -> None:
    """Writes a line below a node's widgets. Nothing happens outside a server."""
    if node_id is None:
        return
    from server import PromptServer  # ComfyUI's own, which only a running server has loaded

    PromptServer.instance.send_progress_text(text, node_id)


def nothing_to_show() -> ExecutionBlocker:
    """An output that has no value: what is linked to it is not run, and nothing is wrong."""
    return ExecutionBlocker(None)
