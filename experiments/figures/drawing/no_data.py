"""Why a figure cannot be drawn.

raise NoDataError("no run of this campaign was propagated (run.scope = site), so there are no outcomes")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


class NoDataError(ValueError):
    """The campaign lacks a figure's data; the message tells the reader of a report why."""


def need_columns(table: pd.DataFrame, names: tuple[str, ...], what: str) -> None:
    """Raise ``NoDataError`` unless every column is there and has a value somewhere."""
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise NoDataError(f"no {what} in this campaign: its runs have no column {', '.join(missing)}")
    empty = [name for name in names if not table[name].notna().any()]
    if empty:
        raise NoDataError(f"no {what} in this campaign: {', '.join(empty)} is empty in all {len(table):,} runs")


def need_rows(table: pd.DataFrame, reason: str) -> None:
    """Raise ``NoDataError`` with this reason if the table is empty."""
    if table.empty:
        raise NoDataError(reason)


def need_one_setting(runs: pd.DataFrame) -> None:
    """Raise ``NoDataError`` if runs differ in a field of ``detect``: rates would mix several settings."""
    from experiments.analysis.statistics.distinct import check_one_setting

    try:
        check_one_setting(runs)
    except UsageError as error:
        raise NoDataError(str(error)) from error
