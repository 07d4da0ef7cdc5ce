"""``python -m stylewright`` is the command ``stylewright``."""

from .training.cli import main

if __name__ == "__main__":
    main()
