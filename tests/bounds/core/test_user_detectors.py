"""Detectors of users: loaded from files and modules, once a process, with errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from attention_states import random_state, replaced
from registrations import registrations_undone

from bounds import Detector, get_detector, list_detectors
from bounds.user_detectors import is_detector_path, load_detector

SOURCE = """
import torch
from bounds import Detector
from bounds.core.row_check import RowCheck, judged

class SmallOutputs(Detector):
    name = "{name}"
    needs = frozenset({{"out"}})
    statement = "outputs are below 100"
    cost = "d"

    def judge(self, state, baseline):
        largest = state.out.abs().amax(-1).double()
        return judged(self.name, RowCheck(largest, torch.full_like(largest, 100.0)), allowance=self.tolerance)

class Unfinished(Detector):
    name, needs, statement, cost = "unfinished", frozenset(), "nothing", "1"

NUMBER = 3

class NoDetector:
    pass
"""


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with registrations_undone():
        yield


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "my_checks.py"
    path.write_text(SOURCE.format(name="small"))
    return path


def test_detector_of_a_file_works_like_any_other(file: Path) -> None:
    loaded = load_detector(f"{file}:SmallOutputs")
    assert issubclass(loaded, Detector)
    assert loaded.name == "small"
    assert "small" in list_detectors()
    state = random_state()
    assert get_detector("small").check(state).violations == 0
    assert get_detector("small").check(replaced(state, out=state.out + 1000)).violations == 2 * 4 * 12


def test_detector_of_a_module_and_of_a_relative_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load_detector("my_checks.py:SmallOutputs").name == "small"
    (file.parent / "other_checks.py").write_text(SOURCE.format(name="small too"))
    monkeypatch.syspath_prepend(str(file.parent))
    assert load_detector("other_checks:SmallOutputs").name == "small too"


def test_loading_again_changes_nothing(file: Path) -> None:
    first = load_detector(f"{file}:SmallOutputs")
    registered = list_detectors()
    assert load_detector(f"{file}:SmallOutputs") is first
    assert load_detector(f"{file.parent}/../{file.parent.name}/{file.name}:SmallOutputs") is first
    assert list_detectors() == registered


def test_class_that_registers_itself_is_accepted(file: Path) -> None:
    source = SOURCE.format(name="itself").replace("class Small", "@register_detector\nclass Small")
    file.write_text("from bounds import register_detector\n" + source)
    assert load_detector(f"{file}:SmallOutputs").name == "itself"
    assert load_detector(f"{file}:SmallOutputs").name == "itself"


@pytest.mark.parametrize("entry", ["", "x", ":x", "x:", ":"])
def test_an_entry_without_module_or_class_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"allowed 'module:Class' or 'file\.py:Class'"):
        load_detector(entry)


def test_missing_file_names_the_nearest(file: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*my_cheks\.py'; did you mean 'my_checks\.py'\?"):
        load_detector(f"{file.parent}/my_cheks.py:SmallOutputs")
    with pytest.raises(ValueError, match="there is no file"):
        load_detector(f"{file.parent}/no_folder/my_checks.py:SmallOutputs")


def test_missing_module_is_told_from_a_module_that_misses_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no module 'no_such_package'") as raised:
        load_detector("no_such_package.checks:Mine")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)
    (file.parent / "needy_checks.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(file.parent))
    with pytest.raises(ValueError, match="needy_checks imports 'no_such_library', which is missing"):
        load_detector("needy_checks:Mine")
    with pytest.raises(ValueError, match=r"needy_checks\.py imports 'no_such_library', which is missing"):
        load_detector(f"{file.parent}/needy_checks.py:Mine")


def test_an_error_of_the_module_is_chained_and_can_be_mended(file: Path) -> None:
    good = file.read_text()
    file.write_text("1 / 0\n")
    with pytest.raises(ValueError, match="cannot be imported: ZeroDivisionError") as raised:
        load_detector(f"{file}:SmallOutputs")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    file.write_text("def broken(:\n")
    with pytest.raises(ValueError, match="cannot be imported: SyntaxError"):
        load_detector(f"{file}:SmallOutputs")
    file.write_text(good)
    assert load_detector(f"{file}:SmallOutputs").name == "small"


def test_what_is_no_complete_detector_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="has no class 'SmallOutput'; did you mean 'SmallOutputs'"):
        load_detector(f"{file}:SmallOutput")
    with pytest.raises(ValueError, match=r"got NoDetector, allowed a subclass of bounds\.Detector"):
        load_detector(f"{file}:NoDetector")
    with pytest.raises(ValueError, match="got int, allowed a subclass"):
        load_detector(f"{file}:NUMBER")
    with pytest.raises(ValueError, match="it does not implement judge"):
        load_detector(f"{file}:Unfinished")


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ('cost = "d"', "", "class attribute cost: got None, allowed a text"),
        ('statement = "outputs are below 100"', 'statement = ""', "class attribute statement: got ''"),
        ('frozenset({"out"})', '"out"', "class attribute needs: got 'out', allowed a frozenset"),
        ('frozenset({"out"})', 'frozenset({"output"})', "class attribute needs: got 'output', .*did you mean 'out'"),
        ('name = "small"', 'name = "full"', "'full' is that of a suite"),
        ('name = "small"', 'name = "a:b"', "holds a colon"),
        ('name = "small"', 'name = "finite"', "the name 'finite' is taken by FiniteDetector"),
        ('name = "small"', 'name = "oracle_small"', "exactly the oracles' names start with"),
    ],
)
def test_class_attributes_are_checked(file: Path, line: str, instead: str, message: str) -> None:
    assert line in file.read_text()
    file.write_text(file.read_text().replace(line, instead, 1))
    registered = list_detectors()
    with pytest.raises(ValueError, match=message):
        load_detector(f"{file}:SmallOutputs")
    assert list_detectors() == registered


def test_entries_are_told_from_names() -> None:
    assert is_detector_path("file.py:Mine")
    assert not any(is_detector_path(name) for name in list_detectors())


def test_a_detector_of_this_package_keeps_its_theorem_when_it_is_loaded_by_path() -> None:
    assert load_detector("bounds.finite_detector:FiniteDetector").proved
    assert get_detector("finite").proved
