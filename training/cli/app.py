"""The commands, and what they share: how an error looks and which exit code it has.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
"""

import logging
import sys
import traceback
from collections.abc import Sequence

import typer

from ..errors import TrainingError
from .density import density
from .files import convert, inspect
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
app.command()(train)
app.command()(resume)
app.command()(density)
app.command()(inspect)
app.command()(convert)


@app.callback()
def options() -> None:
    """Learn a visual style from a few pictures, and use it."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; errors go to stderr in one line."""
    logging.basicConfig(level=logging.WARNING, format="stylewright: %(message)s", stream=sys.stderr)
    debug = DEBUG in arguments
    try:
        app([argument for argument in arguments if argument != DEBUG], prog_name="stylewright")
    except (ValueError, TrainingError, OSError, ModuleNotFoundError) as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"stylewright: {error}", err=True)
        return 1
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0
    return 0
