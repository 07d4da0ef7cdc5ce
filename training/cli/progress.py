"""A progress bar on stderr, and a Ctrl-C that waits for the end of a step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import typer


class Update(Protocol):
    """Shows that ``done`` of ``total`` pieces of the task ``title`` are finished."""

    def __call__(self, title: str, done: int, total: int, detail: str = "") -> None: ...


@contextmanager
def progress_bar(*, shown: bool = True) -> Iterator[Update]:
    """A bar for each task, on stderr. Where that is no terminal, only how each task ended."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), disable=not shown
    ) as bars:
        tasks = {}

        def update(title: str, done: int, total: int, detail: str = "") -> None:
            if title not in tasks:
                tasks[title] = bars.add_task(title, total=total, detail=detail)
            bars.update(tasks[title], completed=done, total=total, detail=detail)

        yield update


@contextmanager
def patient_interrupt(*, speaks: bool = True) -> Iterator[Callable[[], None]]:
    """Inside, the first Ctrl-C only takes note; calling the result then raises KeyboardInterrupt. A second one does
    not wait. SIGTERM is the same: the launcher sends it where another process has died, clusters before they stop one.
    """
    asked = False

    def take_note(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if speaks:
            typer.echo("\nstopping after this batch (Ctrl-C again: at once)", err=True)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = {each: signal.signal(each, take_note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
