"""The lines of a text file of any size, found by their number: the file stays on disk, and so does where they begin.

An index is made once, in a few seconds for millions of lines, and found again by the file's place, size and time.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..formats.state import write_atomically

DIGEST_BYTES = 16  # of the content, before the index's beginnings
NUMBER = np.dtype("<i8")
AT_ONCE = 2**16  # beginnings that are kept in memory while an index is made


class Lines(Sequence[str]):
    """Lines without the white space around them; empty ones, and those that begin with #, are none."""

    def __init__(self, path: Path, folder: Path, check: Callable[[str], object]) -> None:
        """``folder`` is for the index. ``check`` raises ValueError for a line with braces that cannot be used.

        ValueError where the file cannot be read, and for such a line, or one that is no UTF-8, with its number.
        """
        self._path = path
        try:
            index = folder / f"lines-{_name(path)}.index"
            if not index.exists():
                write_atomically(index, lambda temporary: _write_index(path, temporary, check))
        except OSError as error:
            raise ValueError(f"Cannot read the lines of {path}: {error}") from error
        mapped = np.memmap(index, np.uint8, "r")
        self.digest = mapped[:DIGEST_BYTES].tobytes().hex()  # of the whole file
        self._begins = mapped[DIGEST_BYTES:].view(NUMBER)

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        with self._path.open("rb") as file:
            file.seek(int(self._begins[number]))
            return file.readline().decode().strip()


def _name(path: Path) -> str:
    about = path.stat()
    told = repr((str(path.resolve()), about.st_size, about.st_mtime_ns))
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def _check(text: bytes, check: Callable[[str], object], where: str) -> None:
    try:
        check(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: no UTF-8 ({error}): save the file as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _write_index(path: Path, index: Path, check: Callable[[str], object]) -> None:
    content, begins, place = hashlib.blake2b(digest_size=DIGEST_BYTES), array("q"), 0
    with path.open("rb") as lines, index.open("wb") as file:
        file.write(bytes(DIGEST_BYTES))
        for number, line in enumerate(lines, start=1):
            content.update(line)
            text = line.strip()
            if text and not text.startswith(b"#"):
                if not text.isascii() or b"{" in text or b"}" in text:  # any other is UTF-8, and has no braces
                    _check(text, check, f"{path}, line {number}")
                begins.append(place)
            place += len(line)
            if len(begins) == AT_ONCE:
                file.write(np.array(begins, NUMBER).tobytes())
                begins = array("q")
        file.write(np.array(begins, NUMBER).tobytes())
        file.seek(0)
        file.write(content.digest())
