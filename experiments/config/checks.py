"""Checks of a field's value; the error says what is allowed.

>>> check_at_least("run.threads", 4, 1)
>>> check_choice("run.engine", "fst", ("auto", "plain", "fast"))
Traceback (most recent call last):
    ...
experiments.errors.UsageError: run.engine: got 'fst', allowed auto, plain, fast; did you mean 'fast'?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.errors import UsageError
from fault_injection.names import nearest


def check_choice(key: str, got: Any, allowed: Sequence[str]) -> None:
    """Raise ``UsageError`` unless ``got`` is one of the allowed names."""
    if got not in allowed:
        raise UsageError(f"{key}: got {got!r}, allowed {', '.join(allowed)}{nearest(str(got), allowed)}")


def check_at_least(key: str, got: int | None, lowest: int) -> None:
    """Raise ``UsageError`` if ``got`` is below ``lowest``."""
    if got is not None and got < lowest:
        raise UsageError(f"{key}: got {got}, allowed {lowest} or more")
