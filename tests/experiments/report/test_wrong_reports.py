"""What no report can be made of: one line, an exit status, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from report_campaign import copied, few_figures, make_campaign

from experiments.command_line import main
from experiments.tables.csv_file import write_text

Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    few_figures(monkeypatch)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_campaign(tmp_path_factory.mktemp("wrong"))


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def content(name: str, text: str) -> Damage:
    return lambda folder: write_text(folder / name, text)


def edited(name: str, edit: Callable[[list[str]], list[str]]) -> Damage:
    def damage(folder: Path) -> None:
        write_text(folder / name, "".join(edit((folder / name).read_text().splitlines(keepends=True))))

    return damage


CASES: dict[str, tuple[Damage, str, int]] = {
    "no configuration": (remove("config.yaml"), "no campaign here", 3),
    "damaged configuration": (content("config.yaml", "a: [1"), "config.yaml is not valid YAML", 2),
    "configuration with a strange grid": (content("config.yaml", "sweep: 3"), "sweep is no mapping", 1),
    "not merged": (remove("runs.csv"), "the shards are not merged; first: python run_sweep.py merge", 3),
    "no plan": (remove("plan.csv"), "plan.csv: no such file", 3),
    "no clean rows": (remove("clean.csv"), "clean.csv: no such file", 3),
    "empty runs": (content("runs.csv", ""), "runs.csv: ", 2),
    "no finished run": (edited("runs.csv", lambda lines: lines[:1]), "has no finished runs", 1),
    "fewer merged runs": (edited("runs.csv", lambda lines: lines[:-5]), "5 runs in the shards are not in runs.csv", 1),
    "torn runs": (edited("runs.csv", lambda lines: [*lines[:-1], lines[-1][:40]]), "runs.csv: ", 2),
    "missing column": (edited("runs.csv", lambda lines: [line.partition(",")[2] for line in lines]), "run_id", 2),
    "torn clean rows": (edited("clean.csv", lambda lines: [*lines[:-1], lines[-1][:20]]), "clean.csv: ", 2),
    "runs of another plan": (edited("plan.csv", lambda lines: lines[:-3]), "not in this plan", 2),
    "plan without an axis": (
        edited("plan.csv", lambda lines: [line.replace("fault.bit", "x") for line in lines]), "no column fault.bit", 1,
    ),
    "damaged provenance": (content("provenance.json", "{"), "provenance.json: is no JSON", 1),
    "provenance of another kind": (content("provenance.json", "[]"), "must hold a mapping, got list", 1),
    "arguments that are none": (content("provenance.json", '{"arguments": 3}'), "arguments: got 3, allowed a list", 1),
    "arguments that are no texts": (content("provenance.json", '{"arguments": ["a", 3]}'), "allowed a list", 1),
    "more cells in propagation": (
        edited("propagation.csv", lambda lines: [*lines[:3], f"{lines[3][:-1]},7\n", *lines[4:]]),
        "Expected 3 columns, got 4", 2,
    ),
    "a cell too many in every line of propagation": (
        edited("propagation.csv", lambda lines: [lines[0], *(f"{line[:-1]},7\n" for line in lines[1:])]),
        "propagation.csv: is damaged", 2,
    ),
    "fewer cells in propagation": (
        edited("propagation.csv", lambda lines: [*lines[:3], lines[3].rpartition(",")[0] + "\n", *lines[4:]]),
        "propagation.csv: is damaged", 2,
    ),
    "a text in propagation": (
        edited("propagation.csv", lambda lines: [*lines[:3], lines[3].rpartition(",")[0] + ",x\n", *lines[4:]]),
        "propagation.csv: is damaged", 2,
    ),
    "ragged failures": (content("failures.csv", "run_id,exception\n1,2,3\n1,2\n"), "failures.csv: line 2 has 3", 1),
    "empty failures": (content("failures.csv", ""), "failures.csv: is empty", 1),
    "ragged stops": (content("stops.csv", "cell,reason\n1\n"), "stops.csv: line 2 has 1 cells, expected 2", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_is_refused_in_one_line(campaign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    damage, says, status = CASES[case]
    folder = copied(campaign, tmp_path / "micro")
    damage(folder)
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    assert main(["report", str(folder)]) == status
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.startswith("run_sweep.py: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_run_being_written_is_not_waited_for(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    with (folder / "shards" / "0001.csv").open("a") as stream:
        stream.write("0123456789abcdef,0,0,mod")
    assert main(["report", str(folder)]) == 0


def test_without_provenance_the_page_says_so(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    (folder / "provenance.json").unlink()
    assert main(["report", str(folder)]) == 0
    assert "nothing is known of the machine" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("arguments", "says"), [([], "needs one campaign folder"), (["a", "b"], "needs one campaign")])
def test_one_folder_is_needed(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *arguments]) == 2
    assert says in capsys.readouterr().err
