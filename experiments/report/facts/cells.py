"""Tables of the page: cells with a text to read and a number to sort by.

>>> rate_cell(27, 27, 1.0, 0.875, 1.0)
Cell(text='100.0 %', key=1.0, detail='87.5–100.0; 27/27')
>>> rows = ((text_cell("scores"), count_cell(1234)),)
>>> table = Table("outcomes", "What the faults did", (Column("location"), Column("n", numeric=True)), rows)
>>> [cell.text for cell in table.rows[0]]
['scores', '1,234']
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

DASH = "\N{EN DASH}"
NOTHING = DASH


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: the visible text.
        key: the number by which a numeric column is sorted; ``None`` without a number.
        detail: a second, smaller line.
    """

    text: str
    key: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its heading, whether it holds numbers, and what the heading means."""

    heading: str
    numeric: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """A table: the first column names the row.

    Attributes:
        name: its identifier in the page.
        caption: its contents in words.
        columns: the headings.
        rows: the cells.
        note: a sentence below it.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def is_missing(value: Any) -> bool:
    """Return whether a scalar is missing (``None``, ``NA``) or NaN."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def text_cell(value: Any) -> Cell:
    """Return a cell of a text."""
    return Cell(NOTHING if is_missing(value) or value == "" else str(value))


def count_cell(value: Any) -> Cell:
    """Return a cell of a whole number."""
    return Cell(NOTHING) if is_missing(value) else Cell(f"{int(value):,}", float(value))


def number_cell(value: Any, digits: int = 3) -> Cell:
    """Return a cell of a number with ``digits`` significant digits; ``inf`` counts as a number, NaN as missing."""
    if is_missing(value):
        return Cell(NOTHING)
    return Cell(f"{float(value):.{digits}g}", float(value))


def rate_text(rate: Any, low: Any, high: Any) -> str:
    """Return a rate with its interval, in percent.

    >>> rate_text(0.5914, 0.5563, 0.6256)
    '59.1 % (55.6–62.6)'
    """
    if is_missing(rate):
        return NOTHING
    middle, limits = _percents(rate, low, high)
    return f"{middle} ({limits})"


def rate_cell(successes: Any, n: Any, rate: Any, low: Any, high: Any) -> Cell:
    """Return a cell of a rate, with its interval and its counts in the second line."""
    if is_missing(rate) or is_missing(n) or not n:
        return Cell(NOTHING, None, "of 0")
    middle, limits = _percents(rate, low, high)
    return Cell(middle, float(rate), f"{limits}; {_whole(successes)}/{_whole(n)}")


def _percents(rate: float, low: Any, high: Any) -> tuple[str, str]:
    """Return a rate and its interval in percent, with more digits if the interval is narrow."""
    if is_missing(low) or is_missing(high):
        return f"{100 * rate:.1f} %", "no interval"
    digits = 1 if high - low >= 0.002 or low == high else 3
    return f"{100 * rate:.{digits}f} %", f"{100 * low:.{digits}f}{DASH}{100 * high:.{digits}f}"


def _whole(value: Any) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{float(value):,.1f}"
