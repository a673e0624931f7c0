"""What CONTRIBUTING says of adding things: its files are there, its tables are in them, each recipe has a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding things")[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in ADDING.splitlines() if line.startswith("| a")]
RECIPES = {row[0].split()[-1] if row[0] != "a kind of fault" else "kind" for row in ROWS} - {"architecture"}


def test_every_file_that_a_recipe_names_is_there() -> None:
    named = re.findall(
        r"`((?:experiments|fault_injection|bounds|tests)/[\w/]+(?:\.py)?/?)`", " ".join(map(" ".join, ROWS))
    )
    assert len(named) > 12
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_is_in_the_file_beside_it(row: list[str]) -> None:
    found = re.match(r"`([A-Z_]+)` in `([\w/.]+)`", row[2])
    if found is not None:
        assert re.search(rf"^{found[1]}\b.*=", (ROOT / found[2]).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_recipe_has_a_test_and_every_test_a_recipe() -> None:
    tested = {path.stem.removeprefix("test_recipe_") for path in Path(__file__).parent.glob("test_recipe_*.py")}
    assert tested == RECIPES
