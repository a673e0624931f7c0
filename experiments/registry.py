"""Tables of named entries: launchers, sources of data, task families, figures.

    LAUNCHERS = Registry("--launcher", {"local": Launcher(...), "slurm": Launcher(...)})
    LAUNCHERS.find("locl")          # UsageError: --launcher: got 'locl', allowed local, slurm; did you mean 'local'?

An entry may name code that is heavy to import, as ``module:name``; ``loaded`` imports it when it is needed.

>>> colours = Registry("colour", {"red": 1})
>>> with colours.registered("blue", 2):
...     print(*colours, colours.find("blue"))
red blue 2
>>> "blue" in colours
False
>>> loaded("math:sqrt")(4.0)
2.0
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from experiments.errors import UsageError, nearest

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name, in the order in which lists show them.

    Args:
        what: what an error calls the name, such as the option that takes it.
        entries: the entries.
    """

    def __init__(self, what: str, entries: Mapping[str, Entry]) -> None:
        self._what = what
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str) -> Entry:
        """Return the entry of this name.

        Raises:
            UsageError: no entry has this name; the message lists the names and the nearest one.
        """
        if name not in self._entries:
            raise UsageError(f"{self._what}: got {name!r}, allowed {', '.join(self)}{nearest(name, self)}")
        return self._entries[name]

    @contextmanager
    def registered(self, name: str, entry: Entry) -> Iterator[None]:
        """Add an entry after the others, until the block ends.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self._what}: {name!r} is taken, allowed a new name")
        self._entries[name] = entry
        try:
            yield
        finally:
            del self._entries[name]


def loaded(where: str) -> Any:
    """Return the object that ``module:name`` names."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
