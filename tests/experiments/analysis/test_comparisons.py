"""Means, weighted estimates, comparisons, rankings and detectors against what is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from simulated_runs import runs_of, simulated

from experiments.analysis import (
    bound_tightness,
    compare,
    detector_comparison,
    epsilon_distribution,
    hajek,
    horvitz_thompson,
    loss_change,
    margin_statistics,
    overhead,
    rank_cells,
    wilson_interval,
)
from experiments.analysis.means import mean_table
from experiments.analysis.ranking import design_effect, holm
from experiments.analysis.statistics.cluster_sums import ClusterSums
from experiments.analysis.statistics.resampling import bootstrap_limits
from experiments.errors import UsageError

CELLS = [(layer, head) for layer in range(3) for head in range(4)]


def test_means_count_finite_values_and_resample_clusters() -> None:
    runs = runs_of(6, epsilon=[1.0, 2.0, 3.0, math.nan, math.inf, 10.0], batch_index=[0, 0, 1, 1, 2, 2])
    row = epsilon_distribution(runs).iloc[0]
    assert (row.n, row["mean"], row["median"], row.clusters) == (4, 4.0, 2.5, 3)
    assert row.low < 4 < row.high
    one = epsilon_distribution(runs, "batch_index").iloc[0]
    assert math.isnan(one.low)
    assert one.method == "none: fewer than two clusters"


def test_the_bootstrap_is_repeatable_and_as_wide_as_the_t_interval_for_normal_clusters() -> None:
    influence = np.random.default_rng(0).normal(size=200)
    influence = (influence - influence.mean()) / 200
    found = bootstrap_limits(1.0, influence)
    assert found == bootstrap_limits(1.0, influence)
    half = 1.972 * math.sqrt(200 * influence.var(ddof=1))
    assert (found.high - 1, 1 - found.low) == pytest.approx((half, half), rel=0.08)


def test_clusters_that_agree_say_nothing_of_the_width_of_a_mean() -> None:
    row = mean_table(runs_of(12, batch_index=np.arange(12) // 3), np.tile([0.1, 0.2, 0.4], 4)).iloc[0]
    assert row["mean"] == pytest.approx(0.7 / 3)
    assert math.isnan(row.low)
    assert math.isnan(row.high)
    assert (row.clusters, row.method) == (4, "none: all clusters agree")


def test_a_mean_of_two_ways_is_wider_than_of_the_wider_one() -> None:
    generator = np.random.default_rng(12)
    inputs, heads = np.arange(400) // 20, np.arange(400) % 20
    values = generator.normal(size=20)[inputs] + generator.normal(size=20)[heads] + generator.normal(0, 0.1, 400)
    runs = runs_of(400, batch_index=inputs, index_head=heads)
    both = mean_table(runs, values).iloc[0]
    alone = [mean_table(runs, values, cluster=[name]).iloc[0] for name in ("batch_index", "index_head")]
    widths = [row.high - row.low for row in alone]
    assert both.high - both.low == pytest.approx(math.hypot(*widths), rel=0.1)


def test_a_mean_of_weighted_runs() -> None:
    runs = runs_of(4, sampling_weight=[1.0, 1.0, 2.0, 4.0], batch_index=range(4))
    row = mean_table(runs, np.array([1.0, 2.0, 3.0, 5.0])).iloc[0]
    assert row["mean"] == pytest.approx((1 + 2 + 6 + 20) / 8)
    assert row["median"] == 4.0, "half of the weight lies at 3 or below, half at 5"


def test_margins_tightness_and_loss() -> None:
    runs = runs_of(
        4,
        batch_index=range(4),
        epsilon_margin=[-math.inf, -1.0, 1.0, math.nan],
        epsilon=[1.0, 2.0, 4.0, 0.0],
        epsilon_lower=[0.5, 1.0, -1.0, 0.0],
        epsilon_upper=[2.0, 4.0, 8.0, 1.0],
        outcome=["nonfinite", "benign", "benign", "nonfinite"],
        loss_diff=[math.nan, 1.0, 3.0, math.inf],
    )
    margin = margin_statistics(runs).iloc[0]
    assert (margin.n, margin.outside, margin.outside_n, margin["mean"]) == (2, 2, 3, 0.0)
    assert margin.share_outside == pytest.approx(2 / 3)
    assert margin_statistics(runs, "outcome").outside.tolist() == [1, 1]
    tight = bound_tightness(runs).set_index("quantity")
    assert tight["mean"].to_dict() == {"upper_over_epsilon": 2.0, "epsilon_over_lower": 2.0}
    assert tight.n.to_dict() == {"upper_over_epsilon": 3, "epsilon_over_lower": 2}
    loss = loss_change(runs).iloc[0]
    assert (loss.n, loss["mean"], loss.nonfinite) == (2, 2.0, 2)


def test_overhead_is_a_ratio_of_sums() -> None:
    runs = runs_of(
        3,
        fault_id="a",
        batch_index=range(3),
        location=["q", "q", "k"],
        injection_seconds=[1.0, 1.0, 2.0],
        bounds_seconds=[1.0, 0.0, 0.0],
        detection_seconds=[1.0, 0.0, 1.0],
        correction_seconds=math.nan,
    )
    table = overhead(runs)
    assert table.part.tolist() == ["injection", "bounds", "detection", "correction", "overhead"]
    last = table.iloc[-1]
    assert (last["mean"], last["median"], last.n) == (0.75, 0.5, 3)
    by = overhead(runs, "location")
    assert by.location.tolist() == ["k"] * 5 + ["q"] * 5
    assert by[by.part == "overhead"]["mean"].tolist() == [0.5, 1.0]


def test_weighted_estimators_and_their_variance_hold_in_simulation() -> None:
    generator = np.random.default_rng(5)
    values = generator.random(200) ** 3
    drawn = 0.2 / 200 + 0.8 * values / values.sum()
    drawn /= drawn.sum()
    found = []
    for _ in range(3000):
        chosen = generator.choice(200, 80, p=drawn)
        weights = (1 / 200) / drawn[chosen]
        found.append([*horvitz_thompson(values[chosen], weights), *hajek(values[chosen], weights)])
    ht, ht_variance, ratio, ratio_variance = np.array(found).T
    truth = values.mean()
    assert ht.mean() == pytest.approx(truth, abs=4 * ht.std() / math.sqrt(3000))
    assert ht_variance.mean() == pytest.approx(ht.var(), rel=0.1)
    assert ratio.mean() == pytest.approx(truth, rel=0.05)
    assert ratio_variance.mean() == pytest.approx(ratio.var(), rel=0.15)
    with pytest.raises(UsageError, match="got shapes"):
        hajek([1.0], [1.0, 2.0])
    with pytest.raises(UsageError, match="got -1"):
        horvitz_thompson([1.0], [-1.0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0]


def test_the_design_effect_of_clusters_that_always_agree_is_their_size() -> None:
    size = np.full(400, 8.0)
    hits = np.where(np.random.default_rng(0).random(400) < 0.3, 8.0, 0.0)
    assert design_effect([ClusterSums(hits, size, size, size, hits)]) == pytest.approx(8, rel=0.02)
    nothing = np.zeros(400)
    assert design_effect([ClusterSums(nothing, size, size, size, nothing)]) == 8


def test_a_planted_head_ranks_first_and_is_named() -> None:
    rates = dict.fromkeys(CELLS, 0.05) | {(2, 1): 0.35}
    runs = simulated(rates, 30, 8, 0.2, np.random.default_rng(7))
    ranking = rank_cells(runs)
    assert ranking.loc[0, ["layer", "index_head"]].tolist() == [2, 1]
    assert ranking.evidence.tolist() == [True] + [False] * 11
    assert ranking.n.sum() == len(runs)
    assert ranking.attrs["verdict"].startswith("layer 2 index_head 1: harmful in ")


@pytest.mark.parametrize("campaigns", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_a_uniform_model_gives_no_evidence_in_95_of_100_campaigns(campaigns: int) -> None:
    generator = np.random.default_rng(8)
    alarms = 0
    for _ in range(campaigns):
        ranking = rank_cells(simulated(dict.fromkeys(CELLS, 0.1), 20, 6, 0.2, generator))
        alarms += bool(ranking.evidence.any())
        assert ranking.attrs["verdict"].startswith("no evidence") != bool(ranking.evidence.any())
    # 5 % of them and three standard errors.
    assert alarms <= 0.05 * campaigns + 3 * math.sqrt(campaigns * 0.05 * 0.95)


def test_rankings_of_little() -> None:
    assert rank_cells(runs_of(4)).attrs["verdict"].startswith("fewer than two cells")
    heads = pd.array([0, 1, None, None], dtype="Int64")
    assert rank_cells(runs_of(4, index_head=heads, batch_index=range(4))).n.tolist() == [1, 1]
    with pytest.raises(UsageError, match="by: got no column"):
        rank_cells(runs_of(4), [])
    with pytest.raises(UsageError, match="measure: got 'harmfull', allowed detected, harmful; did you mean 'harmful'"):
        rank_cells(runs_of(4), measure="harmfull")


def test_pairs_of_the_same_faults_are_sharper_than_two_samples() -> None:
    generator = np.random.default_rng(9)
    chance = generator.random(40).repeat(10)
    seen = generator.random(400) < chance
    runs = runs_of(400, batch_index=np.arange(40).repeat(10), violation_detected=seen)
    better = runs.assign(violation_detected=seen | (generator.random(400) < 0.2))
    paired = compare(better, runs).iloc[0]
    expected = (better.violation_detected.mean() - seen.mean(), 400)
    assert (paired.difference, paired.n_a) == pytest.approx(expected)
    assert 0 < paired.low < paired.high
    assert paired.p_value < 0.01
    elsewhere = runs.assign(fault_id=[f"g{i}" for i in range(400)], batch_index=np.arange(40).repeat(10) + 100)
    alone = compare(better, elsewhere).iloc[0]
    assert (bool(paired.paired), bool(alone.paired)) == (True, False)
    assert alone.high - alone.low > 2 * (paired.high - paired.low)


def test_only_shared_faults_are_paired() -> None:
    runs = runs_of(60, batch_index=range(60), violation_detected=[True, False] * 30)
    row = compare(runs, runs.iloc[:40]).iloc[0]
    assert (row.n_a, row.n_b, row.difference, row.p_value) == (40, 40, 0.0, 1.0)
    assert row.low == -row.high < 0, "no difference seen is not no difference"


def test_comparison_by_group_and_of_extremes() -> None:
    runs = runs_of(80, batch_index=range(80), location=["q", "k"] * 40, violation_detected=True)
    table = compare(runs, runs.assign(violation_detected=(runs.location == "q").to_numpy()), "location")
    assert table.location.tolist() == ["k", "q"]
    assert table.difference.tolist() == [1.0, 0.0]
    assert table.low[0] > 0.8
    assert table.p_value[0] < 1e-6


def sample(count: int, rate: float, clusters: int, side: str, generator: np.random.Generator) -> pd.DataFrame:
    """Return runs of faults and inputs of their own, with a correlation of 0.2 within inputs."""
    chances = generator.beta(4 * rate, 4 * (1 - rate), clusters) if rate else np.zeros(clusters)
    inputs = np.arange(count) % clusters
    harmful = generator.random(count) < chances[inputs]
    return runs_of(count, fault_id=[f"{side}{place}" for place in range(count)], batch_index=inputs + 1000 * ord(side),
                   outcome=np.where(harmful, "critical", "benign"))  # fmt: skip


def test_a_side_of_three_runs_keeps_its_uncertainty() -> None:
    many = runs_of(300, batch_index=range(300), outcome=["critical"] * 76 + ["benign"] * 224)
    few = runs_of(3, batch_index=range(1000, 1003), fault_id=list("xyz"))
    row = compare(many, few, measure="harmful").iloc[0]
    low, high = wilson_interval(76, 300)
    beyond = wilson_interval(0, 3)[1]
    assert row.low == pytest.approx(76 / 300 - math.hypot(76 / 300 - low, beyond))
    assert row.high == pytest.approx(high)
    assert row.p_value > 0.2
    assert row.clusters == 3


def test_two_samples_against_newcombe() -> None:
    """Statistics in Medicine 17:873, 1998, table II, method 10: 56/70 - 48/80."""
    sides = [
        runs_of(n, batch_index=np.arange(n) + 1000 * n, fault_id=[f"{n}-{place}" for place in range(n)],
                outcome=["critical"] * hits + ["benign"] * (n - hits))
        for hits, n in ((56, 70), (48, 80))
    ]  # fmt: skip
    row = compare(*sides, measure="harmful").iloc[0]
    assert (round(row.low, 4), round(row.high, 4)) == (0.0524, 0.3339)


@pytest.mark.parametrize("few", [2, 5, 20])
def test_the_p_value_is_that_of_the_limits(few: int) -> None:
    generator = np.random.default_rng(few)
    outside = 0
    for rate in np.linspace(0, 0.9, 20):
        a, b = sample(20 * few, 0.2, few, "a", generator), sample(400, rate, 40, "b", generator)
        row = compare(a, b, measure="harmful").iloc[0]
        assert (row.p_value < 0.05) == (not row.low <= 0 <= row.high)
        outside += row.p_value < 0.05
    assert 0 < outside < 20


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("few", [2, 3, 5, 100])
def test_few_clusters_on_one_side_raise_no_false_alarm(few: int, rate: float) -> None:
    generator = np.random.default_rng(14)
    pairs = [(sample(20 * few, rate, few, "a", generator), sample(2000, rate, 100, "b", generator)) for _ in range(200)]
    alarms = sum(compare(a, b, measure="harmful").p_value[0] < 0.05 for a, b in pairs)
    assert alarms <= 0.07 * 200


@pytest.mark.slow
def test_comparing_a_campaign_with_its_like_finds_nothing_in_95_of_100() -> None:
    generator = np.random.default_rng(10)
    pairs = [[simulated({(0, 0): 0.2}, 30, 8, 0.2, generator) for _ in "ab"] for _ in range(200)]
    found = [
        compare(a, b.assign(fault_id="g" + b.fault_id, batch_index=b.batch_index + 100), measure="harmful").iloc[0]
        for a, b in pairs
    ]
    assert sum(row.p_value < 0.05 for row in found) <= 10 + 3 * math.sqrt(200 * 0.05 * 0.95)
    missed = sum(not row.low <= 0 <= row.high for row in found)
    assert 2 <= missed <= 20


def detecting_runs() -> pd.DataFrame:
    return runs_of(6, batch_index=range(6), outcome=["critical", "critical", "nonfinite", "benign", "masked", "benign"],
                   effective=[True] * 4 + [False, True], detectors=["s@w", "s@w;q@o", "", "q@o", "", ""],
                   unproved_detectors=["", "ranger", "ranger", "ranger", "ranger", ""],
                   oracle_detectors=["oracle_comb"] * 6)  # fmt: skip


def test_detectors_are_compared_on_the_same_faults() -> None:
    clean = pd.DataFrame({"detector": ["s@w", "q@o", "comb", "KV", "ranger", "oracle_comb"], "tolerance": 0.0,
                          "proved": [True] * 4 + [False, True], "applicable": [True] * 3 + [False, True, True],
                          "rows_checked": [4, 4, 4, 0, 5, 4], "violations": [0, 0, 0, 0, 2, 1]})  # fmt: skip
    table = detector_comparison(detecting_runs(), clean).set_index("detector")
    assert table.kind.to_dict() == {"KV": "proved", "s@w": "proved", "q@o": "proved", "comb": "proved",
                                    "ranger": "unproved", "oracle_comb": "oracle", "epsilon": "suite"}  # fmt: skip
    assert table.detected["s@w"] == pytest.approx(2 / 6)
    assert table.recall_critical[["s@w", "q@o", "comb", "ranger", "epsilon"]].tolist() == pytest.approx(
        [2 / 3, 1 / 3, 0, 2 / 3, 2 / 3]
    )
    assert table.recall_effective["ranger"] == pytest.approx(3 / 5)
    assert table.exclusive[["s@w", "q@o", "ranger", "oracle_comb"]].tolist() == [1, 0, 1, 0]
    assert table.union[["s@w", "q@o", "ranger"]].tolist() == pytest.approx([2 / 3, 2 / 3, 1])
    assert table.n.drop("KV").tolist() == [6] * 6
    assert table.harmful_n["s@w"] == 3
    assert pd.isna(table.n["KV"])
    assert (table.false_positives["ranger"], table.clean_rows["ranger"]) == (2, 5)
    assert pd.isna(table.false_positives["oracle_comb"])
    assert table.cost["q@o"] == "n + d"


def test_without_clean_rows_only_detectors_that_fired_are_known() -> None:
    table = detector_comparison(detecting_runs())
    assert table.detector.tolist() == ["s@w", "q@o", "ranger", "oracle_comb"]
    assert table.false_positives.isna().all()


def test_detectors_of_two_settings_are_not_mixed() -> None:
    with pytest.raises(UsageError, match=r"detect\.tolerance: got runs with 0, 1, allowed runs of one value"):
        detector_comparison(detecting_runs().assign(**{"detect.tolerance": [0, 1] * 3}))


def test_counts_of_weighted_detectors_are_those_of_the_runs() -> None:
    table = detector_comparison(detecting_runs().assign(sampling_weight=[4, 0.1, 0.1, 1, 1, 0.5])).set_index("detector")
    row = table.loc["s@w"]
    assert (row.seen, row.n, row.seen_harmful, row.harmful_n, row.seen_effective, row.effective_n) == (2, 6, 2, 3, 2, 5)
    assert row.recall_critical == pytest.approx(4.1 / 4.2)


def test_the_verdict_weighs_the_others_too_and_a_cell_of_no_weight_shows_nothing() -> None:
    generator = np.random.default_rng(11)
    head = np.arange(3000) % 3
    harmful = generator.random(3000) < np.where(head == 0, 0.6, 0.1)
    weight = np.where(head == 2, 0.0, np.where(harmful, 0.5, 1.5))
    runs = runs_of(3000, index_head=head, batch_index=generator.integers(0, 50, 3000), sampling_weight=weight,
                   outcome=np.where(harmful, "critical", "benign"))  # fmt: skip
    ranking = rank_cells(runs)
    rest = head == 1
    elsewhere = 100 * (harmful * weight)[rest].sum() / weight[rest].sum()
    assert f"against {elsewhere:.1f} % elsewhere" in ranking.attrs["verdict"]
    assert ranking.p_value[ranking.index_head == 2].tolist() == [1.0]
