"""The positions of a table's rows in the files of the shards, to copy them in the order of the plan.

    places = RowPlaces()
    places.begin_file(path)
    places.add(run, offset, line)                # for every row found in it, in the order of the file
    write_lines(target, columns, places.in_order())

Memory holds four numbers for each run, not its rows: a million runs take tens of megabytes.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from experiments.errors import CheckRefusedError
from experiments.tables.row_lines import ELSEWHERE

BLOCK_BYTES = 1 << 25
"""How much is read, sorted and passed on together."""


class RowPlaces:
    """Rows by the number of their run; the rows of one run stay in the order in which they were added."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._inodes: list[int] = []
        # One entry for each stretch of neighbouring rows of one run.
        self._run, self._file, self._offset, self._length = array("q"), array("q"), array("q"), array("q")
        self._elsewhere: list[bytes] = []

    def begin_file(self, path: Path) -> None:
        """Begin a file: all rows added from now on are in it."""
        self._files.append(path)
        self._inodes.append(path.stat().st_ino)

    def add(self, run: int, offset: int, line: bytes) -> int:
        """Note a row of ``row_lines``; return the number of its stretch."""
        if offset == ELSEWHERE:
            self._elsewhere.append(line)
            return self._begin(run, ELSEWHERE, len(self._elsewhere) - 1, len(line))
        file = len(self._files) - 1
        if self._run and (self._run[-1], self._file[-1], self._offset[-1] + self._length[-1]) == (run, file, offset):
            self._length[-1] += len(line)
            return len(self._run) - 1
        return self._begin(run, file, offset, len(line))

    def _begin(self, run: int, file: int, offset: int, length: int) -> int:
        self._run.append(run)
        self._file.append(file)
        self._offset.append(offset)
        self._length.append(length)
        return len(self._run) - 1

    def rows(self, stretch: int) -> bytes:
        """Return the rows of one stretch."""
        return self._read([stretch])

    def in_order(self) -> Iterator[bytes]:
        """Yield all rows by the number of their run, many together.

        Raises:
            CheckRefusedError: a file was replaced since its rows were noted.
        """
        if not self._run:
            return
        # Imported here: what finds no rows needs no numpy.
        import numpy as np

        order = np.argsort(np.frombuffer(self._run, dtype=np.int64), kind="stable")
        blocks = np.cumsum(np.frombuffer(self._length, dtype=np.int64)[order]) // BLOCK_BYTES
        for stretches in np.split(order, np.flatnonzero(np.diff(blocks)) + 1):
            yield self._read(stretches.tolist())

    def _read(self, stretches: Sequence[int]) -> bytes:
        """Return the rows of some stretches; each file is opened once and read from front to back."""
        found: list[bytes] = [b""] * len(stretches)
        places = sorted(
            (self._file[stretch], self._offset[stretch], self._length[stretch], position)
            for position, stretch in enumerate(stretches)
        )
        for file, group in itertools.groupby(places, key=lambda place: place[0]):
            if file == ELSEWHERE:
                for _, number, _, position in group:
                    found[position] = self._elsewhere[number]
                continue
            with self._files[file].open("rb") as stream:
                self._check_unchanged(file, stream)
                for _, offset, length, position in group:
                    stream.seek(offset)
                    found[position] = stream.read(length)
        return b"".join(found)

    def _check_unchanged(self, file: int, stream: BinaryIO) -> None:
        if os.fstat(stream.fileno()).st_ino != self._inodes[file]:
            raise CheckRefusedError(f"{self._files[file]}: was replaced while it was read; a worker began there anew")
