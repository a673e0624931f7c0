"""Pseudo-bulk: the two summaries by hand, and what is refused."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from monitoring.pseudobulk import pseudobulk

ROWS = pd.DataFrame(
    {"layer": [0, 0, 0, 0, 1, 1], "kv_head": [0, 0, 1, 1, 0, 0], "ssr_QK": [0.1, 0.3, 0.5, 0.5, 0.2, 0.9]}
)


def test_the_two_modes_by_hand() -> None:
    flat, layers = pseudobulk(ROWS, "ssr_QK"), pseudobulk(ROWS, "ssr_QK", then="per_layer")
    assert flat.values == pytest.approx((0.2, 0.5, 0.55))
    assert (flat.mode, flat.groups, layers.mode, layers.groups) == ("flat", 3, "per_layer", 3)
    assert (flat.median, flat.mean) == pytest.approx((0.5, 0.41666666667))
    assert layers.values == pytest.approx((0.35, 0.55))
    assert layers.median == pytest.approx(0.45)


def test_with_one_head_to_a_group_it_is_the_plain_median() -> None:
    rows = pd.DataFrame({"layer": [0, 0, 1, 1], "kv_head": [0, 1, 0, 1], "x": [4.0, 1.0, 2.0, 9.0]})
    assert pseudobulk(rows, "x").median == rows.x.median()


def test_missing_values_are_dropped_and_missing_heads_are_head_0() -> None:
    rows = pd.DataFrame({"layer": [0, 0, 0], "kv_head": [None, 0, 1], "x": [1.0, 3.0, math.nan]})
    assert pseudobulk(rows, "x").values == (2.0,)
    nothing = pseudobulk(rows.assign(x=math.nan), "x")
    assert (nothing.values, nothing.median, nothing.mean) == ((), None, None)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="column: got 'ssr_QV', allowed layer, kv_head, ssr_QK; did you mean 'ssr_QK'"):
        pseudobulk(ROWS, "ssr_QV")
    with pytest.raises(ValueError, match="column: got 'head'"):
        pseudobulk(ROWS, "ssr_QK", by=["layer", "head"])
    with pytest.raises(ValueError, match="then: got 'per-layer', allowed flat, per_layer; did you mean 'per_layer'"):
        pseudobulk(ROWS, "ssr_QK", then="per-layer")
    with pytest.raises(ValueError, match="by: got no column"):
        pseudobulk(ROWS, "ssr_QK", by=[])
