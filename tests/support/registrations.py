"""Detectors that a test registers are gone behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bounds.registry import list_detectors, unregister_detector


@contextmanager
def registrations_undone() -> Iterator[None]:
    before = set(list_detectors())
    try:
        yield
    finally:
        for name in set(list_detectors()) - before:
            unregister_detector(name)
