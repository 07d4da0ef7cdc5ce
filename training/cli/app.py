"""The commands, and what they share: how an error looks and which exit code it has.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import typer

from ..errors import TrainingError
from .approximate import approximate
from .crops import crops
from .demo import demo
from .density import density
from .distill import distill
from .embedded import app as embedded
from .files import convert, inspect
from .generate import generate
from .imitate import imitate
from .merge import merge
from .resize import resize
from .train import resume, train

DEBUG = "--debug"

app = typer.Typer(
    name="stylewright",
    help="Learn a visual style from a few pictures, and use it.",
    epilog=f"{DEBUG}, anywhere: show where an error comes from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(command: Callable[..., None]) -> None:
    """Registers a command under its name. Ctrl-C leaves it with the code that shells expect."""

    @functools.wraps(command)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("stylewright: interrupted", err=True)
            raise typer.Exit(130) from None

    app.command()(call)


for each in (
    demo,
    train,
    resume,
    distill,
    imitate,
    crops,
    generate,
    density,
    inspect,
    convert,
    resize,
    merge,
    approximate,
):
    _add(each)

app.add_typer(embedded, name="embedded")


@app.callback()
def options() -> None:
    """Learn a visual style from a few pictures, and use it."""


class Messages(logging.Handler):
    """Log messages as lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"stylewright: {record.getMessage()}", err=True)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; errors go to stderr in one line, or are raised with --debug."""
    logging.basicConfig(level=logging.WARNING, handlers=[Messages()])
    logging.getLogger(__name__.partition(".training")[0]).setLevel(logging.INFO)
    try:
        app([_dashed(argument) for argument in arguments if argument != DEBUG], prog_name="stylewright")
    except (ValueError, TrainingError, OSError, ModuleNotFoundError) as error:
        if DEBUG in arguments:
            raise
        typer.echo(f"stylewright: {error}", err=True)
        return 1
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0
    return 0


def _dashed(argument: str) -> str:
    """``--learning_rate``, as the TOML file spells it, is ``--learning-rate``."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument
