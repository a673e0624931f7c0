"""The recipe for a data source: a function that returns texts, and a row of ``SOURCES``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from micro_campaign import table

from experiments.config.source_names import SOURCES, SourceForm

MODULE = '''
"""A file of letters as one document, in reverse."""

from experiments.inputs.sources import existing_path


def read_backwards(source, field, split):
    return [existing_path(source).read_text()[::-1]]
'''


def test_a_source_is_a_function_and_a_row(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str],
    toy: Callable[[str, str], None],
) -> None:  # fmt: skip
    toy("toy_source", MODULE)
    row = SourceForm("backwards:PATH", "a text file, read from its end", documents="toy_source:read_backwards")
    with SOURCES.registered("backwards", row):
        assert "backwards:PATH     a text file, read from its end" in listed("sources")
        folder = campaign("--data.source", "backwards:text.txt")
        runs = table(folder / "runs.csv")
        assert {run["source"] for run in runs} == {"backwards:text.txt"}
        assert all(run["outcome"] for run in runs)
        assert "backwards:text.txt" in page(folder)
