"""Intervals of one rate against published digits and SciPy; coverage by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.interval_coverage import CROSSED, MEANS, RATES, crossed_coverage, main, mean_coverage, rate_coverage
from experiments.analysis.rates import rate_of
from experiments.analysis.statistics.cluster_sums import ClusterSums, ratio
from experiments.analysis.statistics.clusters import Grouping, cluster_columns
from experiments.analysis.statistics.intervals import (
    Limits,
    clustered_interval,
    exact_interval,
    exact_limits,
    wilson_interval,
    wilson_limits,
)
from experiments.errors import UsageError
from experiments.report import closing_table

# Newcombe, Statistics in Medicine 17:857, 1998, table I: score method without correction (3), exact method (5).
NEWCOMBE = [
    (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
    (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
    (0, 20, (0.0000, 0.1611), (0.0000, 0.1684)),
    (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
]


@pytest.mark.parametrize(("hits", "n", "wilson", "exact"), NEWCOMBE)
def test_published_digits(hits: int, n: int, wilson: tuple[float, float], exact: tuple[float, float]) -> None:
    assert tuple(round(limit, 4) for limit in wilson_interval(hits, n)) == wilson
    assert tuple(round(limit, 4) for limit in exact_interval(hits, n)) == exact


def test_nothing_of_a_thousand() -> None:
    assert round(wilson_interval(0, 1000)[1], 4) == 0.0038


def test_the_closing_table_still_offers_its_interval() -> None:
    assert closing_table.wilson_interval is wilson_interval


@given(n=st.integers(1, 3000), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_limits_for_any_number_of_trials_agree_with_scipy(n: int, share: float, confidence: float) -> None:
    hits = round(share * n)
    test = stats.binomtest(hits, n)
    for method, found in (
        ("wilson", wilson_limits(hits / n, n, confidence)),
        ("exact", exact_limits(hits / n, n, confidence)),
        ("wilson", wilson_interval(hits, n, confidence)),
        ("exact", exact_interval(hits, n, confidence)),
    ):
        expected = test.proportion_ci(confidence, method)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("interval", [wilson_interval, exact_interval])
@pytest.mark.parametrize(("hits", "n"), [(4, 3), (-1, 3), (0, 0)])
def test_counts_that_cannot_be(interval: Callable[[int, int], Limits], hits: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"got {hits} of {n}, allowed 1 trial or more"):
        interval(hits, n)


def test_no_trials_no_limits() -> None:
    for found in (wilson_limits(math.nan, 0), exact_limits(math.nan, 0), clustered_interval(0.5, 0.1, 3, 0, 0)):
        assert all(math.isnan(limit) for limit in found)


def test_effective_number_of_trials_by_hand() -> None:
    """A design effect of 4 and the quantiles of t leave 960 / 4 (t_959 / t_20)^2 trials."""
    expected = wilson_limits(0.2, 240 * (stats.t.ppf(0.975, 959) / stats.t.ppf(0.975, 20)) ** 2)
    assert clustered_interval(0.2, 4 * 0.2 * 0.8 / 960, 20, 960, 60) == pytest.approx(expected, abs=1e-12)


def test_clusters_that_disagree_less_than_chance_do_not_narrow_the_limits() -> None:
    assert clustered_interval(0.5, 1e-9, 59, 100, 60) == wilson_limits(0.5, 100)
    assert clustered_interval(0.5, 0.0, 59, 100, 60) == wilson_limits(0.5, 100)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_nothing_or_all_counts_clusters(rate: float) -> None:
    found = clustered_interval(rate, 0.0, 59, 960, 60)
    assert found == pytest.approx(wilson_interval(round(60 * rate), 60))
    assert found[1] - found[0] > 0.05


def test_a_lone_cluster_is_one_trial() -> None:
    sums = ClusterSums(*(np.array([number]) for number in (3.0, 10.0, 10.0, 10.0, 3.0)))
    row = rate_of(sums)
    assert (row["low"], row["high"]) == pytest.approx(wilson_limits(0.3, 1))


def test_the_variance_of_a_ratio_is_that_of_leaving_out_one_cluster() -> None:
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 30, 12).astype(float)
    hits = generator.binomial(sizes.astype(int), 0.3).astype(float)
    left = np.array([(hits.sum() - y) / (sizes.sum() - n) for y, n in zip(hits, sizes, strict=True)])
    found = ratio(ClusterSums(hits, sizes, sizes, sizes, hits))
    expected = 11 / 12 * ((left - hits.sum() / sizes.sum()) ** 2).sum()
    assert found.value == pytest.approx(hits.sum() / sizes.sum())
    assert found.variance == pytest.approx(expected, rel=1e-12)


def test_skewed_clusters_leave_few_degrees_of_freedom() -> None:
    ones = np.ones(40)
    even, skewed = np.tile([0.0, 1.0], 20), np.eye(40)[0]
    assert ratio(ClusterSums(even, ones, ones, ones, even)).degrees == pytest.approx(39)
    assert ratio(ClusterSums(skewed, ones, ones, ones, skewed)).degrees < 5


def test_the_variance_of_two_ways_is_their_sum_less_that_of_both() -> None:
    generator = np.random.default_rng(4)
    frame = pd.DataFrame({"i": generator.integers(0, 12, 300), "h": generator.integers(0, 9, 300)})
    hits = generator.random(300) < 0.1 + 0.05 * frame.i + 0.03 * frame.h
    found = {}
    for name, cluster in {"i": ["i"], "h": ["h"], "both": ["i", "h"], "two": [["i"], ["h"]]}.items():
        [(_, sums)] = Grouping(frame, None, cluster).sums(hits.to_numpy())
        found[name] = ratio(sums)
    assert found["two"].variance == pytest.approx(
        found["i"].variance + found["h"].variance - found["both"].variance, rel=1e-12
    )
    assert found["two"].degrees == min(found["i"].degrees, found["h"].degrees)
    assert found["two"].variance > max(found["i"].variance, found["h"].variance)


def test_ways_that_cancel_leave_the_larger_and_lone_ones_count_for_nothing() -> None:
    frame = pd.DataFrame({"i": [0, 0, 1, 1], "h": [0, 1, 0, 1], "one": 0})
    # Inputs and heads agree exactly; only their combinations differ.
    [(_, sums)] = Grouping(frame, None, [["i"], ["h"]]).sums(np.array([0, 1, 1, 0]))
    assert ratio(sums).variance == 0
    [(_, alone)] = Grouping(frame, None, [["i"], ["one"]]).sums(np.array([0, 0, 1, 0]))
    [(_, expected)] = Grouping(frame, None, ["i"]).sums(np.array([0, 0, 1, 0]))
    assert ratio(alone) == ratio(expected)
    assert len(alone.runs) == 2


def test_a_choice_of_clusters() -> None:
    assert cluster_columns(["model", "layer"]) == ["model", "layer"]
    with pytest.raises(UsageError, match="allowed a list of columns, or a list of such lists"):
        cluster_columns(["model", ["layer"]])


def test_the_script_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--campaigns", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert "0.0038" in lines[0]
    assert len(lines) == 7 + len(RATES) + len(CROSSED) + len(MEANS)


@pytest.mark.slow
@pytest.mark.parametrize("setting", RATES[:3], ids=str)
def test_limits_of_rates_hold_in_95_of_100_campaigns(setting: object) -> None:
    found = rate_coverage(setting, 2000)  # type: ignore[arg-type]
    assert 0.935 <= found.printed <= 0.965
    assert found.naive < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("setting", MEANS[:2], ids=str)
def test_limits_of_means_hold_in_95_of_100_campaigns(setting: object) -> None:
    found = mean_coverage(setting, 2000)  # type: ignore[arg-type]
    assert 0.935 <= found.printed <= 0.965
    assert found.naive < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("setting", CROSSED[:4], ids=str)
def test_limits_hold_where_inputs_and_heads_cross(setting: object) -> None:
    found = crossed_coverage(setting, 1000)  # type: ignore[arg-type]
    assert 0.93 <= found.printed <= 0.97
    assert found.naive < 0.65
