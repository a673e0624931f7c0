"""The lines of docs/analysis.md run, on campaigns of the names they use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from micro_campaign import MicroPlace

from experiments.command_line import main

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "analysis.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    locations = "--sweep.fault.location=scores,weights"
    root = tmp_path_factory.mktemp("document")
    with MicroPlace.entered(root) as place:
        common = (locations, "--num_runs=4", "--run.propagation=true")
        assert main(place.arguments(Path("results"), *common, name="default", bits="3,22,30,31")) == 0
        half = (*common, "--model.dtype=bfloat16")
        assert main(place.arguments(Path("results"), *half, name="half", bits="3,14,15")) == 0
        yield root


def test_the_lines_run_and_print_what_the_document_shows(campaigns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    blocks = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert len(blocks) == 7
    with pd.option_context("display.width", 200):
        for lines, shown in blocks:
            capsys.readouterr()
            exec(compile(lines, str(DOCUMENT), "exec"), names)
            printed = capsys.readouterr().out
            if "to_string" in lines:
                # Numbers are those of other campaigns; the columns are the same.
                heads = [line.split() for line in shown.splitlines() if line.split()[0].isidentifier()]
                assert printed.splitlines()[0].split() == heads[0]
            else:
                assert bool(printed) == bool(shown)
    assert set(names["by_field"]["bit_field"]) == {"mantissa", "exponent", "sign"}
    assert int(names["by_field"]["n"].sum()) == len(names["runs"].drop_duplicates("fault_id"))
    assert names["seen"].loc[0, "n"] == names["by_field"]["successes"].sum()
    assert names["difference"]["difference"].tolist() == pytest.approx(
        (names["difference"]["rate_a"] - names["difference"]["rate_b"]).tolist(), nan_ok=True
    )
