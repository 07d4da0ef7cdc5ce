"""Encoded prompts by the million, on disk: SQLite files, of which each process writes its own and reads all.

A row is found by a hash of the prompt and of its encoder, as in :mod:`.cache`, whose one file a row is too many here.
Nothing is in memory but the rows that are asked for.
"""

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import TrainingError
from .cache import VERSION, digest, digest_named, settled

TABLE = "CREATE TABLE IF NOT EXISTS rows (name TEXT PRIMARY KEY, checksum TEXT, tensors BLOB) WITHOUT ROWID"
PATIENCE = 60.0  # seconds to wait for another process that writes


class Store:
    """A folder of such files."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        """``process``: whose file is written. ValueError where that fails."""
        self._own = folder / f"rows-{process}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with closing(self._open(self._own)) as file, file:
                file.execute(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"Cannot keep encoded prompts in {self._own}: {error}. Delete that file, or name another folder"
            ) from error

    def recall(self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors under ``key``, made and kept if they are not there."""
        name = digest(VERSION, kind, key)
        for path in (self._own, *sorted(self._own.parent.glob("rows-*.sqlite"))):
            if (found := self._read(path, name)) is not None:
                return found
        tensors = settled(make())
        self._write(name, tensors)
        return tensors

    def _read(self, path: Path, name: str) -> dict[str, Tensor] | None:
        """None where there is no row that can be trusted."""
        try:
            with closing(self._open(path)) as file:
                row = file.execute("SELECT checksum, tensors FROM rows WHERE name = ?", (name,)).fetchone()
            tensors = None if row is None else load(row[1])
        except (sqlite3.Error, SafetensorError):
            return None
        return tensors if tensors is not None and digest_named(tensors) == row[0] else None

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        try:
            with closing(self._open(self._own)) as file, file:
                row = (name, digest_named(tensors), save(dict(tensors)))
                file.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            raise TrainingError(f"Cannot write {self._own}: {error}. Make room there, or use another folder") from error

    def _open(self, path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=PATIENCE)
