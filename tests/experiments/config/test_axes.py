from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config.axes import axis_values
from experiments.errors import UsageError


@pytest.mark.parametrize(
    ("given_values", "expanded"),
    [
        ("0:4", [0, 1, 2, 3]), ("0:32:8", [0, 8, 16, 24]), ("31:29:-1", [31, 30]), ("-2:1", [-2, -1, 0]),
        ("3:4", [3]), ("30", [30]), ("scores,weights", ["scores", "weights"]), (" q , k ", ["q", "k"]),
        ("1e-6,1e-3", [1e-6, 1e-3]), ("0:3,30,31", [0, 1, 2, 30, 31]), ("[0, [0, 31], sign]", [0, [0, 31], "sign"]),
        ("['0:3', 7]", [0, 1, 2, 7]), ("[0:3, 7]", [0, 1, 2, 7]), ("null,3", [None, 3]), ("true,false", [True, False]),
        ([0, 1], [0, 1]), (["0:3"], [0, 1, 2]), ([30, [0, 31], "8:24:8"], [30, [0, 31], 8, 16]), ([None], [None]),
        (5, [5]), (None, [None]), ([[0, 1]], [[0, 1]]), (["1e-6"], ["1e-6"]), (["text:a", "x:b"], ["text:a", "x:b"]),
        ("text:a,text:b", ["text:a", "text:b"]), (r"h\.0\.,h\.1\.", [r"h\.0\.", r"h\.1\."]),
    ],
)  # fmt: skip
def test_how_values_are_written(given_values: Any, expanded: list[Any]) -> None:
    got = axis_values("fault.bit", given_values)
    assert got == expanded
    assert [type(value) for value in got] == [type(value) for value in expanded]


@given(start=st.integers(-50, 50), stop=st.integers(-50, 50), step=st.integers(-7, 7))
def test_a_range_is_that_of_python_or_refused(start: int, stop: int, step: int) -> None:
    expected = list(range(start, stop, step)) if step else []
    for text in (f"{start}:{stop}:{step}", [f"{start}:{stop}:{step}"]):
        if expected:
            assert axis_values("seed", text) == expected
        else:
            with pytest.raises(UsageError, match=r"sweep\.seed: the range .* is empty"):
                axis_values("seed", text)


@pytest.mark.parametrize("nothing", [[], "[]", "5:5", "0:4:0", "", " "])
def test_an_empty_axis_is_refused(nothing: Any) -> None:
    with pytest.raises(UsageError, match=r"sweep\.fault\.bit: (got no values|the range .* is empty)"):
        axis_values("fault.bit", nothing)


@pytest.mark.parametrize("twice", ["1,1", "0:4,3", [1, 2, 1], [[0, 31], [0, 31]], "q,k,q", ["0:3", 2]])
def test_a_value_that_is_given_twice_is_refused(twice: Any) -> None:
    with pytest.raises(UsageError, match=r"sweep\.x: .* is given twice"):
        axis_values("x", twice)


def test_true_is_not_one() -> None:
    assert axis_values("x", [1, True]) == [1, True]


@pytest.mark.parametrize("text", ["{a", "@a", "*x,y", '"open', "q,%k", "[a", "`a", "!t"])
def test_what_is_no_yaml_is_refused_with_the_key(text: str) -> None:
    with pytest.raises(UsageError, match=r"sweep\.fault\.location"):
        axis_values("fault.location", text)


def test_a_huge_axis_expands() -> None:
    assert len(axis_values("seed", "0:3000")) == 3000
