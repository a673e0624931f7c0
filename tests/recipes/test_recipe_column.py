"""The recipe for a column: one line of a row type, which says where its value comes from.

In the tree the line stands in ``ExperimentResult``; here it stands in a subclass that takes its place for the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
from micro_campaign import table

from experiments.analysis import load_runs
from experiments.command_line import main
from experiments.tables.columns import column, row_of
from experiments.tables.schema import ExperimentResult, columns, readme_lines, widened


@dataclass(frozen=True, kw_only=True)
class Wider(ExperimentResult):
    call: int | None = column("which evaluation of its module in the pass, from 0", "first.call", report=True)


def test_a_column_is_one_line(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str], tmp_path: Path
) -> None:
    with widened(ExperimentResult, Wider):
        assert columns(ExperimentResult)[-1] == "call"
        assert "  call                integer or empty: which evaluation of its module in the pass" in listed("columns")
        assert "| `call` | integer or empty |  | which evaluation of its module in the pass, from 0 |" in readme_lines()
        folder = campaign()
        assert {run["call"] for run in table(folder / "runs.csv")} == {"0"}
        assert load_runs(folder)["call"].dtype == pd.Int64Dtype()
        assert main(["export", str(folder), "--output", str(tmp_path / "runs.parquet")]) == 0
        assert str(pyarrow.parquet.read_schema(tmp_path / "runs.parquet").field("call").type) == "int64"
        assert ">call<" in page(folder)
    assert "call" not in columns(ExperimentResult)


def test_a_source_that_does_not_exist_is_an_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(ExperimentResult):
        wrong: int | None = column("nothing", "first.nothing")

    with widened(ExperimentResult, Wrong), pytest.raises(AttributeError, match="planned"):
        row_of(ExperimentResult, object())
    with pytest.raises(ValueError, match="allowed only a subclass of ExperimentResult"), widened(ExperimentResult, int):
        pass
