from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from experiments.config.yaml_text import dump_yaml, load_yaml

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["1e-6", "1:32", "0:32", "12", "1.5", "null", "~", "true", "no", "on", "2024-01-01", ".inf", ".nan", "-", "=",
         "<<", "0x1F", "007", "1_000", "+1", "- a", "a: b", "#", "", " ", "@x", "{a", "[a", "*x", "&x", "!x", "%x",
         "\n", "s@w", "q@o", "h\\.[0-3]\\.attn$", "text:/tmp/a b.txt"]
    ),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Compare with types and signs of zero: 1 is not 1.0, 0.0 is not -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return a == b


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E-6", 1e-6), ("1e6", 1e6), ("+1e6", 1e6), ("1.5e3", 1500.0), (".5", 0.5), ("1.", 1.0),
        ("-1.25", -1.25), (".inf", math.inf), ("-.inf", -math.inf), ("0", 0), ("-0", 0), ("12", 12), ("-7", -7),
        ("0x1F", 31), ("1_000", 1000), ("null", None), ("~", None), ("", None), ("true", True), ("False", False),
        ("[1, 2]", [1, 2]), ("{a: 1e-3}", {"a": 1e-3}),
    ],
)  # fmt: skip
def test_numbers_and_words(text: str, value: Any) -> None:
    assert same(load_yaml(text), value)


@pytest.mark.parametrize("text", ["1:32", "0:32", "0:32:4", "-4:4", "1:30:45", "190:20:30", "60:0"])
def test_a_range_is_a_text_and_no_number_to_base_60(text: str) -> None:
    assert same(load_yaml(text), text)
    assert same(load_yaml(f"bits: {text}"), {"bits": text})
    assert same(load_yaml(f"[{text}, 3]"), [text, 3])


def test_nan_is_a_number() -> None:
    value = load_yaml(".nan")
    assert isinstance(value, float)
    assert math.isnan(value)


@pytest.mark.parametrize("text", ["e5", "1e", "--1", "1.2.3", "0b11", "0o17", "nan", "inf", "1e-6x", "scores", "s@w"])
def test_other_texts_stay_texts(text: str) -> None:
    assert same(load_yaml(text), text)


@pytest.mark.parametrize("text", ["2024-01-01", "2024-01-01 10:00:00"])
def test_a_date_is_a_text(text: str) -> None:
    # No field is a date; a campaign may be named after one.
    assert same(load_yaml(text), text)


@pytest.mark.parametrize("text", ["{a", "[1, 2", "a: b: c", '"open', "\t- a", "@a"])
def test_what_is_no_yaml_is_an_error(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_a_key_that_is_given_twice_is_an_error() -> None:
    with pytest.raises(yaml.YAMLError, match="seed"):
        load_yaml("seed: 1\nname: x\nseed: 2\n")


def test_no_python_objects_are_made() -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml("!!python/object/apply:os.getcwd []")


@given(value=VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert same(load_yaml(dump_yaml(value)), value)


@given(value=st.dictionaries(st.sampled_from("zyxabc"), st.integers()))
def test_the_order_of_keys_is_kept(value: dict[str, int]) -> None:
    assert list(load_yaml(dump_yaml(value)) or {}) == list(value)
