from __future__ import annotations

import csv
import dataclasses
import math
import re
import struct
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from micro_campaign import files_below

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.merge import merge_campaign
from experiments.command_line import main
from experiments.config import ExperimentConfig
from experiments.errors import CheckRefusedError
from experiments.plan.plan import make_plan
from experiments.tables import parquet as parquet_export
from experiments.tables.column_types import KINDS, arrow_schema, column_types
from experiments.tables.csv_file import write_rows
from experiments.tables.parquet import export_parquet
from experiments.tables.schema import TABLES, DetectionRow, ExperimentResult, FailureRow, PropagationRow, cells, columns

ROW_TYPES = [*TABLES.values(), PropagationRow]


def written(path: Path, row_type: type[Any], rows: Sequence[Any]) -> Path:
    write_rows(path, columns(row_type), map(cells, rows))
    return path


def campaign(tmp_path: Path) -> CampaignFolder:
    config = ExperimentConfig(name="x", output_dir=str(tmp_path), num_runs=2)
    plan, folder = make_plan(config), CampaignFolder.of(config)
    folder.begin(config, plan)
    rows = [ExperimentResult(run_id=run.run_id, outcome="benign", bit=3) for run in plan.runs]
    written(folder.shards / "0001.csv", ExperimentResult, rows)
    written(folder.shards / "0001.detections.csv", DetectionRow, [DetectionRow(run_id=plan.runs[1].run_id)])
    return folder


# ------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_every_column_has_the_type_that_its_field_is_annotated_with(row_type: type[Any]) -> None:
    types = column_types(row_type)
    assert list(types) == columns(row_type)
    for field in dataclasses.fields(row_type):
        spelled = types[field.name].kind.__name__ + (" | None" if types[field.name].optional else "")
        assert field.type == spelled
    names = {str: "string", bool: "bool", int: "int64", float: "double"}
    assert [str(field.type) for field in arrow_schema(row_type)] == [names[column.kind] for column in types.values()]


@pytest.mark.parametrize("hint", [list[int], int | str, bytes, None, int | float | None])
def test_a_column_of_another_type_is_an_error(hint: Any) -> None:
    made = dataclasses.make_dataclass("Row", [("fine", int), ("other", hint)])
    with pytest.raises(TypeError, match=r"Row\.other: got .*, allowed str, bool, int or float"):
        column_types(made)


# ------------------------------------------------------------------------------------------------- values


def a_value(hint: Any) -> st.SearchStrategy[Any]:
    parts = typing.get_args(hint) or (hint,)
    kind = next(part for part in parts if part in KINDS)
    values: dict[type[Any], st.SearchStrategy[Any]] = {
        str: st.text(st.sampled_from('ab,";é€ 01'), min_size=int(type(None) in parts), max_size=4)
        | st.sampled_from(["nan", "NA", "null", "True", "1e5"]),
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(),
    }
    return st.one_of(values[kind], st.none()) if type(None) in parts else values[kind]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), row_type=st.sampled_from([DetectionRow, FailureRow, PropagationRow]))
def test_every_value_comes_back_to_the_last_bit(tmp_path: Path, data: st.DataObject, row_type: type[Any]) -> None:
    fields = {name: a_value(hint) for name, hint in typing.get_type_hints(row_type).items()}
    rows = data.draw(st.lists(st.builds(row_type, **fields), max_size=5))
    export_parquet(written(tmp_path / "t.csv", row_type, rows), row_type, tmp_path / "t.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    assert table.schema.equals(arrow_schema(row_type))
    assert [bits(row) for row in table.to_pylist()] == [bits(vars(row)) for row in rows]


def bits(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its floats as bytes; there is one NaN in text."""
    return {
        key: ("nan" if math.isnan(value) else struct.pack("<d", value)) if isinstance(value, float) else value
        for key, value in row.items()
    }


def test_an_empty_text_that_always_exists_is_no_missing_value_and_nan_is_none_either(tmp_path: Path) -> None:
    row = ExperimentResult(run_id="r", detectors="", loss_diff=math.nan, nonfinite=True)
    export_parquet(written(tmp_path / "t.csv", ExperimentResult, [row]), ExperimentResult, tmp_path / "t.parquet")
    (found,) = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert (found["detectors"], found["outcome"], found["bit"], found["nonfinite"]) == ("", None, None, True)
    assert math.isnan(found["loss_diff"])
    assert found["kl_mean"] is None


def test_a_table_is_written_in_groups_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_export, "ROWS_IN_GROUP", 7)
    monkeypatch.setattr(parquet_export, "_BLOCK_BYTES", 300)
    rows = [PropagationRow(run_id=f"{n:016}", layer=n, relative_change=n / 7) for n in range(40)]
    source = written(tmp_path / "t.csv", PropagationRow, rows)
    assert export_parquet(source, PropagationRow, tmp_path / "t.parquet") == 40
    file = pyarrow.parquet.ParquetFile(tmp_path / "t.parquet")
    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [7] * 5 + [5]
    assert file.read().column("layer").to_pylist() == list(range(40))


@pytest.mark.parametrize(
    ("column", "value", "named"), [("layer", "three", "three"), ("relative_change", "x", "x"), ("layer", "1.5", "1.5")]
)
def test_a_cell_of_another_type_is_refused_and_the_old_file_stays(
    tmp_path: Path, column: str, value: str, named: str
) -> None:
    row = {"run_id": "r", "layer": "1", "relative_change": "0.5", column: value}
    write_rows(tmp_path / "t.csv", list(row), [list(row.values())])
    (tmp_path / "t.parquet").write_text("of before")
    with pytest.raises(CheckRefusedError, match=rf"t\.csv: .*{named}.*merge again"):
        export_parquet(tmp_path / "t.csv", PropagationRow, tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").read_text() == "of before"
    assert files_below(tmp_path) == ["t.csv", "t.parquet"]


def test_other_columns_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.csv", ["run_id", "depth", "relative_change"], [["r", "1", "0.5"]])
    with pytest.raises(CheckRefusedError, match=r"t\.csv: its columns are not those of this version"):
        export_parquet(tmp_path / "t.csv", PropagationRow, tmp_path / "t.parquet")
    assert files_below(tmp_path) == ["t.csv"]


@pytest.mark.parametrize("cut", [1, 2])
def test_a_torn_file_is_refused(tmp_path: Path, cut: int) -> None:
    write_rows(tmp_path / "t.csv", ["run_id", "layer", "relative_change"], [["r", "1", "0.512"]])
    (tmp_path / "t.csv").write_bytes((tmp_path / "t.csv").read_bytes()[:-cut])
    with pytest.raises(CheckRefusedError, match=r"t\.csv: its last line is cut off"):
        export_parquet(tmp_path / "t.csv", PropagationRow, tmp_path / "t.parquet")
    assert files_below(tmp_path) == ["t.csv"]


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"run_id,layer,relative_change\n\xff,1,0.5\n"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(CheckRefusedError, match=r"t\.csv: .*UTF"):
        export_parquet(tmp_path / "t.csv", PropagationRow, tmp_path / "t.parquet")


# ------------------------------------------------------------------------------------------------- the command


def test_the_runs_are_exported_into_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = campaign(tmp_path)
    merge_campaign(folder)
    assert main(["export", str(folder.path)]) == 0
    assert f"2 rows of {folder.file('runs.csv')} in {folder.file('runs.parquet')}" in capsys.readouterr().out
    with folder.file("runs.csv").open(newline="") as stream:
        ids = [row["run_id"] for row in csv.DictReader(stream)]
    found = pyarrow.parquet.read_table(folder.file("runs.parquet"))
    assert found.column("run_id").to_pylist() == ids
    assert found.column("bit").to_pylist() == [3, 3]
    # What the campaign made does not stand in the way of doing it again.
    folder.clear_all()
    assert files_below(folder.path) == ["shards"]


def test_another_table_and_another_place(tmp_path: Path) -> None:
    folder = campaign(tmp_path)
    merge_campaign(folder)
    target = tmp_path / "elsewhere" / "d.parquet"
    target.parent.mkdir()
    assert main(["export", str(folder.path), "--table", "detections", "--format=parquet", "--output", str(target)]) == 0
    assert pyarrow.parquet.read_table(target).num_rows == 1
    assert not folder.file("detections.parquet").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--table", "run"], 2, "--table: got 'run', allowed runs, detections, .*did you mean 'runs'"),
        (["--format", "csv"], 2, "--format: got 'csv', allowed parquet"),
        (["--output", "{folder}"], 2, "--output: got .*, allowed a file that ends in .parquet"),
        *(
            (["--output", f"{{folder}}/{name}"], 2, "--output: got .*, allowed a file that ends in .parquet")
            for name in ("runs.csv", "clean.csv", "config.yaml", "shards", "runs", "provenance.json")
        ),
        (["--output", "{folder}/none/runs.parquet"], 2, "allowed a file in a folder that exists; .*none does not"),
        (["more"], 2, "export: needs one campaign folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    folder = campaign(tmp_path)
    merge_campaign(folder)
    before = {name: folder.file(name).read_bytes() for name in files_below(folder.path) if folder.file(name).is_file()}
    given = [option.format(folder=folder.path) for option in options]
    assert main(["export", str(folder.path), *given]) == status
    assert re.search(message, capsys.readouterr().err)
    for name, content in before.items():
        assert folder.file(name).read_bytes() == content


def test_a_campaign_that_was_not_merged_has_nothing_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = campaign(tmp_path)
    assert main(["export", str(folder.path)]) == 3
    assert f"run_sweep.py merge {folder.path} makes it" in capsys.readouterr().err
