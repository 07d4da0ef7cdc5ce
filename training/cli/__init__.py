"""The command ``stylewright``: one file for a command or two, put together in :mod:`.app`."""


def main() -> None:
    """Runs the command line of this process. Leaves it with the exit code."""
    import os
    import sys

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # advice for programmers, not for who types a command
    from .app import run

    sys.exit(run(sys.argv[1:]))
