"""A table of named rows in order: the one place where a concept (a location, a kind, a format) is written down.

More rows can be registered, for good or for the duration of a block.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Colour:
...     name: str
...     aliases: tuple[str, ...] = ()
>>> colours = Table("colour", [Colour("red"), Colour("grey", aliases=("gray",))])
>>> colours.names(), colours["gray"].name
(('red', 'grey'), 'grey')
>>> with colours.registered(Colour("blue")):
...     "blue" in colours
True
>>> colours["blu"]
Traceback (most recent call last):
    ...
ValueError: colour: got 'blu', allowed red, grey
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from fault_injection.names import nearest


class Named(Protocol):
    """A row: it has a name, and perhaps ``aliases``."""

    @property
    def name(self) -> str:
        """What the row is called in configurations and results."""


Row = TypeVar("Row", bound=Named)


class Table(Generic[Row]):
    """Rows by name and alias, in the order in which they were given.

    Args:
        what: what a row is, for messages: the field of a configuration that names one.
        rows: the first rows.
    """

    def __init__(self, what: str, rows: Iterable[Row]) -> None:
        self._what = what
        self._rows: dict[str, Row] = {}
        self._names: dict[str, str] = {}
        for row in rows:
            self.register(row)

    def register(self, row: Row) -> None:
        """Add a row behind the others; ``ValueError`` if its name or one of its aliases is taken."""
        names = (row.name, *_aliases(row))
        taken = [name for name in names if name in self._names]
        if taken:
            raise ValueError(f"{self._what}: the name {taken[0]!r} is taken by {self._names[taken[0]]!r}")
        self._rows[row.name] = row
        self._names |= dict.fromkeys(names, row.name)

    @contextmanager
    def registered(self, row: Row) -> Iterator[Row]:
        """Add a row for the duration of the block."""
        self.register(row)
        try:
            yield row
        finally:
            del self._rows[row.name]
            for name in (row.name, *_aliases(row)):
                del self._names[name]

    def __getitem__(self, name: str) -> Row:
        """Return the row of a name or alias; ``ValueError`` names those that are allowed, and the nearest."""
        self._require(name, self._names)
        return self._rows[self._names[name]]

    def check(self, name: str) -> None:
        """Raise the same ``ValueError`` unless a row has this very name; aliases do not count."""
        self._require(name, self._rows)

    def _require(self, name: str, known: Container[str]) -> None:
        if name not in known:
            close = nearest(str(name), self._names)
            raise ValueError(f"{self._what}: got {name!r}, allowed {', '.join(self._rows)}{close}")

    def __contains__(self, name: object) -> bool:
        """Whether a row has this very name; aliases do not count."""
        return name in self._rows

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows in order."""
        return iter(tuple(self._rows.values()))

    def names(self) -> tuple[str, ...]:
        """Return the names in order, without aliases."""
        return tuple(self._rows)


def _aliases(row: Named) -> tuple[str, ...]:
    return tuple(getattr(row, "aliases", ()))
