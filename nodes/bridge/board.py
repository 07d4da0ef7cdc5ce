"""What the panel on a trainer's node shows: the state of each run, sent as it grows and kept for pages opened later.

Over the websocket go messages of the type EVENT with what is new; ``GET /stylewright/runs`` gives all of it, and so
does the node's ``ui`` output, which ComfyUI keeps in its history. The page's side is web/training.js.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest._io import HiddenHolder
from comfy_execution.progress import get_progress_state

from ...training.loops.events import Event

EVENT = "stylewright.training"  # type of our messages
ROUTE = "/stylewright/runs"
UI = "stylewright_training"  # key of the node's ``ui`` output
MOST_POINTS = 800  # of a curve that is sent whole
MOST_RUNS = 32  # that are kept for pages opened later
SHORTEST = 0.25  # seconds between messages that are not news of their own


@dataclass(frozen=True)
class Address:
    """Of a node, for what is told to pages."""

    node_id: str  # as ComfyUI executes it; another node's expansion may have made it
    node: str  # as the page knows it: "12", or "12:3" inside a subgraph
    workflow: str | None  # id of the page's workflow; None where the prompt did not come from a page


@dataclass
class RunState:
    """One run, as far as its panel shows it."""

    node: str  # as in Address
    workflow: str | None
    steps: int
    phase: str = "preparing"  # then training, drawing, and finished, stopped or failed
    text: str = ""  # what is going on, or what became of it
    plan: str = ""  # of the memory
    notes: list[str] = field(default_factory=list)  # what the user should know of this run
    window: float | None = None  # log_snr below which style is decided
    step: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    points: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss since the one before)
    bins: dict[tuple[float, float], tuple[float, int]] = field(default_factory=dict)  # sum of losses, samples
    pictures: dict[str, Any] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Takes a report in."""
        self.step, self.steps = event.step, event.steps
        self.points.append((event.step, event.loss))
        for part in event.loss_by_bin:
            total, samples = self.bins.get((part.low, part.high), (0.0, 0))
            self.bins[part.low, part.high] = (total + part.loss * part.samples, samples + part.samples)
        self.figures = {
            "samples": event.samples,
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "seconds": event.seconds,
            "left": (event.steps - event.step) * event.seconds / max(1, event.step),
            "peak_bytes": event.peak_bytes,
            **({"routing": dict(event.routing)} if event.routing else {}),
        }

    def whole(self) -> dict[str, Any]:
        """All of it, the curve thinned out to MOST_POINTS."""
        return self._message(thinned(self.points, MOST_POINTS), 0)

    def since(self, sent: int) -> dict[str, Any]:
        """With the points after the first ``sent`` only, and the step of the last one before them."""
        return self._message(self.points[sent:], self.points[sent - 1][0] if sent else 0)

    def _message(self, points: Sequence[tuple[int, float]], previous: int) -> dict[str, Any]:
        bins = [[low, high, total / samples, samples] for (low, high), (total, samples) in sorted(self.bins.items())]
        return {
            "node": self.node,
            "workflow": self.workflow,
            "phase": self.phase,
            "text": self.text,
            "plan": self.plan,
            "notes": self.notes,
            "window": self.window,
            "step": self.step,
            "steps": self.steps,
            **self.figures,
            "previous": previous,
            "points": [list(point) for point in points],
            "bins": bins,
            "pictures": self.pictures,
        }


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most ``most`` points: means of groups of equal size, each at the last step of its group."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups] or list(points)


class Board:
    """Sends the states of runs to open pages, and remembers the last ones."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str | None, str], RunState] = {}
        self._sent: dict[tuple[str | None, str], int] = {}  # points of it
        self._last = 0.0

    def open(self, state: RunState) -> None:
        """A run begins, in place of the one that its node had before."""
        key = (state.workflow, state.node)
        self._runs.pop(key, None)
        self._runs[key] = state
        self._sent[key] = 0
        for old in list(self._runs)[:-MOST_RUNS]:
            del self._runs[old], self._sent[old]
        self.show(state, at_once=True)

    def show(self, state: RunState, *, at_once: bool = False) -> None:
        """Sends what is new, unless something was sent a moment ago and this is not urgent."""
        now, key = time.monotonic(), (state.workflow, state.node)
        if self._runs.get(key) is not state or (not at_once and now - self._last < SHORTEST):
            return
        send(EVENT, state.since(self._sent[key]))
        self._sent[key], self._last = len(state.points), now

    def runs(self) -> list[dict[str, Any]]:
        """Of every node that trained in this process, its last run."""
        return [state.whole() for state in list(self._runs.values())]


BOARD = Board()


def address_of(hidden: HiddenHolder) -> Address | None:
    """Of the node that ComfyUI executes now; None outside a server."""
    if hidden.unique_id is None:
        return None
    workflow = (hidden.extra_pnginfo or {}).get("workflow") or {}
    display = get_progress_state().dynprompt.get_display_node_id(hidden.unique_id)
    return Address(hidden.unique_id, display, workflow.get("id"))


def send(kind: str, content: Mapping[str, Any]) -> None:
    """A message to every open page. Nothing happens outside a server."""
    from server import PromptServer  # ComfyUI's own, which only a running server has loaded

    if "instance" in vars(PromptServer):
        PromptServer.instance.send_sync(kind, content)


def serve_runs() -> None:
    """Adds the route ROUTE to the running server."""
    from aiohttp import web
    from server import PromptServer

    if "instance" not in vars(PromptServer):
        return

    @PromptServer.instance.routes.get(ROUTE)
    async def runs(request: web.Request) -> web.Response:
        return web.json_response(BOARD.runs())
