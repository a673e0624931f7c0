from __future__ import annotations

import dataclasses
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.machine.environment import environment_facts
from experiments.tables.columns import column, declared, row_of
from experiments.tables.csv_file import read_rows, write_rows
from experiments.tables.schema import (
    OUTCOMES,
    PER_RUN,
    TABLES,
    TIMINGS,
    UNREPEATABLE,
    CleanRow,
    DetectionRow,
    ExperimentResult,
    FailureRow,
    PropagationRow,
    cell,
    cells,
    columns,
    readme_lines,
)

ROW_TYPES = (ExperimentResult, DetectionRow, PropagationRow, CleanRow, FailureRow)
README = Path(__file__).parents[3] / "results" / "README.md"
PROMISED = [
    "run_id",
    "repeat",
    "seed",
    "model",
    "dtype",
    "device",
    "source",
    "batch_index",
    "layer",
    "module",
    "layer_type",
    "layer_depth",
    "location",
    "kind",
    "bit",
    "bit_field",
    "index_batch",
    "index_head",
    "index_row",
    "index_col",
    "effective",
    "value_before",
    "value_after",
    "bits_before",
    "bits_after",
    "baseline_loss",
    "injected_loss",
    "loss_diff",
    "kl_mean",
    "top1_changed",
    "nonfinite",
    "outcome",
    "violation_detected",
    "detectors",
    "num_violations",
    "epsilon_margin",
    "baseline_seconds",
    "injection_seconds",
    "bounds_seconds",
    "detection_seconds",
    "total_seconds",
    "peak_memory_mb",
    "attention_flops",
    "bounds_flops",
    "execution",
    "hits",
]


def bits_of(number: float) -> bytes:
    return struct.pack("<d", number)


# ------------------------------------------------------------------------------------------------- columns


def test_every_promised_column_is_there_in_the_promised_order() -> None:
    present = columns(ExperimentResult)
    assert [name for name in present if name in PROMISED] == PROMISED


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_every_column_is_documented(row_type: type[Any]) -> None:
    for f in dataclasses.fields(row_type):
        assert len(f.metadata["meaning"]) > 5, f.name
        assert "\n" not in f.metadata["meaning"]
        assert "|" not in f.metadata["meaning"], "would end the cell of the table"


def test_the_readme_is_the_generated_text() -> None:
    assert README.read_text(encoding="utf-8").splitlines() == list(readme_lines())


def sections() -> dict[str, list[str]]:
    """Return the names in the first cells of each table of the readme, by heading."""
    parts = README.read_text(encoding="utf-8").split("\n## ")[1:]
    found = {}
    for part in parts:
        heading, _, text = part.partition("\n")
        found[heading] = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    return found


def test_the_readme_documents_every_column_of_every_table_once() -> None:
    for name, row_type in TABLES.items():
        assert sections()[f"{name}.csv"] == columns(row_type)


def test_the_readme_documents_what_else_lies_in_the_folder() -> None:
    assert sections()["provenance.json"] == [*environment_facts([]), "contexts"]
    assert sections()["plan.csv"] == ["run_id", "repeat"]
    own = {name for name in sections() if name.partition(".")[0] not in TABLES}
    assert own == {"plan.csv", "provenance.json", "shards/", "stops.csv"}
    assert {f"NNNN.{name}.csv" for name in PER_RUN} < set(sections()["shards/"])


def test_timings_are_the_columns_that_measure_the_execution() -> None:
    assert set(TIMINGS) == {name for name in columns(ExperimentResult) if name.endswith(("_seconds", "_mb"))}


def test_units_are_declared_beside_the_names() -> None:
    units = {f.name: f.metadata["unit"] for f in declared(ExperimentResult)}
    assert {name for name, unit in units.items() if unit == "s"} == {
        name for name in units if name.endswith("_seconds")
    }
    assert units["peak_memory_mb"] == "MB"
    assert {name for name, unit in units.items() if unit == "nats"} == {
        *("baseline_loss", "injected_loss", "loss_diff", "kl_mean")
    }


def test_a_value_is_read_along_the_path_of_its_column_and_empty_where_that_ends() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Toy:
        far: int | None = column("far", "one.two")
        near: int | None = column("near")

    assert cells(row_of(Toy, SimpleNamespace(one=SimpleNamespace(two=3), near=4))) == ["3", "4"]
    assert cells(row_of(Toy, SimpleNamespace(one=None, near=0))) == ["", "0"]
    with pytest.raises(AttributeError, match="two"):
        row_of(Toy, SimpleNamespace(one=SimpleNamespace(), near=4))


def test_what_executed_a_run_is_no_timing_and_not_reproducible() -> None:
    assert set(UNREPEATABLE) == {*TIMINGS, "execution"}
    marks = {line.split("`")[1]: line.split()[-2] for line in readme_lines() if line.startswith("| `")}
    assert marks["execution"] == "*(execution)*"
    assert all(marks[name] == "*(timing)*" for name in TIMINGS)


def test_the_run_comes_first_in_every_table_of_runs() -> None:
    for row_type in (ExperimentResult, DetectionRow, FailureRow):
        assert columns(row_type)[0] == "run_id"


def test_outcomes() -> None:
    assert OUTCOMES == ("masked", "benign", "critical", "nonfinite")


# ------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (0.0, "0.0"), (-0.0, "-0.0"),
        (0.1, "0.1"), (1e-45, "1e-45"), (5e-324, "5e-324"), (1.7976931348623157e308, "1.7976931348623157e+308"),
        (True, "True"), (False, "False"), (0, "0"), (-3, "-3"), (2**70, "1180591620717411303424"), ("", ""),
        ("scores", "scores"), ("a\nb", "a b"), ("a,b\"c", "a,b\"c"), (np.float64(0.1), "0.1"), (np.int64(3), "3"),
        (np.float64("nan"), "nan"), (np.bool_(True), "True"),
    ],
    ids=repr,
)  # fmt: skip
def test_cells(value: Any, text: str) -> None:
    assert cell(value) == text


@given(number=st.floats())
def test_a_float_reads_back_to_the_same_bits(number: float) -> None:
    again = float(cell(number))
    # Decimal text has one NaN; of all other numbers every bit comes back.
    assert math.isnan(again) if math.isnan(number) else bits_of(again) == bits_of(number)


@given(number=st.floats(width=32, allow_nan=False))
def test_a_number_of_a_float32_tensor_reads_back_to_the_same_bits(number: float) -> None:
    assert np.float32(cell(number)).tobytes() == np.float32(number).tobytes()


def test_the_name_of_a_model_or_source_is_kept_as_it_is(tmp_path: Path) -> None:
    path = "/data/two  blanks/model"
    row = cells(ExperimentResult(model=path))
    write_rows(tmp_path / "runs.csv", columns(ExperimentResult), [row])
    assert (
        read_rows(tmp_path / "runs.csv", columns(ExperimentResult))[0][columns(ExperimentResult).index("model")] == path
    )


def test_a_row_without_numbers_has_empty_cells_and_no_zeros() -> None:
    assert cells(ExperimentResult()) == [""] * len(columns(ExperimentResult))


def test_the_cells_of_a_row_are_in_the_order_of_the_columns() -> None:
    row = dict(zip(columns(DetectionRow), cells(DetectionRow(run_id="x", layer=3, online=True)), strict=True))
    assert (row["run_id"], row["layer"], row["online"], row["reason"]) == ("x", "3", "True", "")


def test_a_row_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExperimentResult().run_id = "x"  # type: ignore[misc]
