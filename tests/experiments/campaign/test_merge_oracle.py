"""The merge of random shards against one that reads whole files and sorts their rows."""

from __future__ import annotations

import csv
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.merge import merge_campaign
from experiments.config import ExperimentConfig
from experiments.errors import CheckRefusedError
from experiments.plan.plan import Plan, make_plan
from experiments.tables import row_places
from experiments.tables.csv_file import write_rows
from experiments.tables.schema import UNREPEATABLE, DetectionRow, ExperimentResult, cells, columns

RUNS = 6
TEXT = st.sampled_from(["", "plain", "a,b", 'said "so"', "é€", ";"])
DONE = st.tuples(
    st.integers(0, RUNS - 1),  # which run
    st.sampled_from([0.1, 0.1, 0.1, 0.2]),  # its number: sometimes not the same twice
    st.floats(0, 1),  # its time: never the same
    TEXT,
    st.lists(TEXT, max_size=3),  # detections
)
SHARDS = st.lists(st.tuples(st.lists(DONE, max_size=5), st.integers(0, 40), st.booleans()), max_size=4)

CONFIG = ExperimentConfig(name="x", num_runs=3, sweep={"fault.bit": [1, 2]})
PLAN = make_plan(CONFIG)


def naive_merge(folder: CampaignFolder, plan: Plan) -> dict[str, bytes] | None:
    """Return the tables that the shards make; nothing if two workers have different results."""
    order = {run.run_id: run.index for run in plan.runs}
    names = columns(ExperimentResult)
    runs: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    found: list[list[str]] = []
    for path in folder.shard_files():
        for row in whole_rows(path):
            known = runs.setdefault(row[0], row)
            if any(a != b for name, a, b in zip(names, known, row, strict=True) if name not in UNREPEATABLE):
                return None
            owner.setdefault(row[0], path.stem)
    for path in folder.shard_files(".detections"):
        blocks = [list(block) for _, block in itertools.groupby(whole_rows(path), key=lambda row: row[0])]
        for number, block in enumerate(blocks):
            again = next((k for k, row in enumerate(block) if k and row == block[0]), len(block))
            if owner.get(block[0][0]) == path.name[:4] and block[0][0] not in {b[0][0] for b in blocks[:number]}:
                found += block[:again]
    return {
        "runs.csv": written(names, sorted(runs.values(), key=lambda row: order[row[0]])),
        "detections.csv": written(columns(DetectionRow), sorted(found, key=lambda row: order[row[0]])),
    }


def whole_rows(path: Path) -> list[list[str]]:
    # The values here have no line ends, so a row is a line.
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].decode().splitlines(keepends=True)
    return list(csv.reader(lines))[1:]


def written(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        write_rows(Path(place) / "t.csv", header, rows)
        return (Path(place) / "t.csv").read_bytes()


def write_shards(folder: CampaignFolder, shards: list[tuple[list[tuple], int, bool]]) -> None:
    folder.shards.mkdir()
    for number, (done, torn, foreign) in enumerate(shards, start=1):
        stem = folder.shards / f"{number:04d}"
        results = [
            ExperimentResult(run_id=PLAN.runs[run].run_id, loss_diff=loss, total_seconds=seconds, module=text)
            for run, loss, seconds, text, _ in done
        ]
        detections = [
            DetectionRow(run_id=PLAN.runs[run].run_id, detector=f"d{k}", reason=reason)
            for run, _, _, _, reasons in done
            for k, reason in enumerate(reasons)
        ]
        write_rows(stem.with_suffix(".csv"), columns(ExperimentResult), map(cells, results))
        write_rows(stem.with_suffix(".detections.csv"), columns(DetectionRow), map(cells, detections))
        path = stem.with_suffix(".csv")
        if foreign:
            with path.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))
            with path.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
        path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - torn)])


@settings(max_examples=120, deadline=None)
@given(shards=SHARDS, block=st.sampled_from([1, 300, 1 << 25]))
@example(shards=[([(0, 0.1, 0.5, "", ["a", "b"])], 0, False), ([(0, 0.1, 0.7, "", ["c"])], 0, False)], block=1)
@example(shards=[([(3, 0.1, 0.5, 'x"y', ["a,b"]), (1, 0.1, 0.5, "", [])], 3, True)], block=1)
def test_the_tables_are_those_of_a_merge_that_holds_everything(
    shards: list[tuple[list[tuple], int, bool]], block: int
) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_places, "BLOCK_BYTES", block)
        config = CONFIG.with_field("output_dir", place)
        folder = CampaignFolder.of(config)
        folder.begin(config, PLAN)
        write_shards(folder, shards)
        expected = naive_merge(folder, PLAN)
        if expected is None:
            with pytest.raises(CheckRefusedError, match="done twice with different results in"):
                merge_campaign(folder)
            assert not folder.file("runs.csv").exists()
            return
        merged = merge_campaign(folder)
        for name, content in expected.items():
            assert folder.file(name).read_bytes() == content, name
        finished = {row[0] for row in whole_rows(folder.file("runs.csv"))}
        assert merged.finished == len(finished)
        assert merged.missing == tuple(run.run_id for run in PLAN.runs if run.run_id not in finished)
