"""What counts, and the rates of groups, against counts by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from simulated_runs import runs_of, simulated

from experiments.analysis import (
    coverage_of_critical,
    critical_rate,
    detection_rate,
    distinct_faults,
    false_positive_rate,
    hajek,
    outcome_rates,
    rank_cells,
    regression,
)
from experiments.analysis.statistics.clusters import Grouping
from experiments.analysis.statistics.intervals import exact_interval, wilson_interval
from experiments.errors import UsageError


def test_a_fault_counts_once_and_with_its_outcome() -> None:
    runs = runs_of(5, fault_id=list("aaabb"), scope=["site", "site", "full", "site", "site"],
                   outcome=[None, "masked", "critical", None, None])  # fmt: skip
    assert distinct_faults(runs).index.tolist() == [2, 3]


def test_campaigns_and_swept_detection_are_different_experiments() -> None:
    runs = runs_of(4, fault_id="a", campaign=list("xxyy"))
    assert len(distinct_faults(runs)) == 2
    assert len(distinct_faults(runs.assign(**{"detect.tolerance": [0, 1, 0, 1]}))) == 4
    assert len(distinct_faults(runs.assign(**{"fault.index": [0, 1, 0, 1]}))) == 2


def test_weighted_draws_are_all_kept() -> None:
    assert len(distinct_faults(runs_of(3, fault_id="a", sampling_weight=[0.5, 0.5, 2.0]))) == 3


def test_outcomes_are_of_propagated_faults_only() -> None:
    fields = ["sign", "sign", "exponent", "exponent", "sign", "sign"]
    runs = runs_of(6, scope=["full"] * 4 + ["site"] * 2, bit_field=fields,
                   outcome=["masked", "critical", "nonfinite", "benign", "masked", None],
                   violation_detected=[True, True, False, False, True, True], layer=range(6))  # fmt: skip
    table = outcome_rates(runs, "bit_field")
    assert table.outcome.tolist() == ["masked", "benign", "critical", "nonfinite"] * 2
    assert table.bit_field.tolist() == ["exponent"] * 4 + ["sign"] * 4
    assert table.successes.tolist() == [0, 1, 0, 1, 1, 0, 1, 0]
    assert table.n.tolist() == [2] * 8
    assert critical_rate(runs)[["successes", "n"]].values.tolist() == [[2, 4]]
    assert coverage_of_critical(runs)[["successes", "n"]].values.tolist() == [[1, 2]]
    assert detection_rate(runs)[["successes", "n"]].values.tolist() == [[4, 6]], "detection counts all"


def test_independent_runs_have_wilsons_limits_and_clustered_ones_wider() -> None:
    seen = [True] * 30 + [False] * 70
    alone = detection_rate(runs_of(100, violation_detected=seen, batch_index=range(100))).iloc[0]
    assert (alone.low, alone.high) == (alone.wilson_low, alone.wilson_high) == wilson_interval(30, 100)
    assert (alone.exact_low, alone.exact_high) == exact_interval(30, 100)
    assert (alone.method, alone.clusters) == ("Wilson", 100)
    clustered = detection_rate(runs_of(100, violation_detected=seen, batch_index=np.arange(100) // 10)).iloc[0]
    assert clustered.clusters == 10
    assert clustered.method == "Wilson, effective n of clusters"
    assert clustered.low < alone.low < alone.high < clustered.high


def test_clusters_of_another_choice() -> None:
    runs = runs_of(40, violation_detected=[True, False] * 20, batch_index=range(40), layer=[0] * 20 + [1] * 20)
    assert detection_rate(runs, cluster=["layer"]).clusters.tolist() == [2]
    with pytest.raises(UsageError, match=r"column 'laier': not in this table.*did you mean 'layer'"):
        detection_rate(runs, cluster=["laier"])
    with pytest.raises(UsageError, match="did you mean 'layer'"):
        detection_rate(runs, "layr")


def test_missing_heads_make_a_group_and_a_cluster() -> None:
    heads = pd.array([0, None, None, 0], dtype="Int64")
    table = detection_rate(runs_of(4, index_head=heads, violation_detected=[True, False, False, True]), "index_head")
    assert table.n.tolist() == [2, 2]
    assert table.successes.tolist() == [2, 0]
    assert table.index_head.isna().tolist() == [False, True]
    assert str(table.index_head.dtype) == "Int64"


def test_the_order_of_rows_changes_nothing() -> None:
    generator = np.random.default_rng(1)
    runs = simulated({(0, 0): 0.2, (0, 1): 0.3, (1, 0): 0.1}, 12, 5, 0.3, generator)
    shuffled = runs.sample(frac=1, random_state=4)
    pd.testing.assert_frame_equal(critical_rate(runs, ["layer"]), critical_rate(shuffled, ["layer"]))


def test_groups_agree_with_pandas() -> None:
    generator = np.random.default_rng(2)
    frame = pd.DataFrame({"g": generator.integers(0, 5, 500), "c": generator.integers(0, 9, 500)})
    values, weights = generator.random(500), generator.random(500)
    expected = frame.assign(v=values * weights, w=weights, n=1).groupby(["g", "c"])[["v", "w", "n"]].sum()
    found = list(Grouping(frame, "g", ["c"]).sums(values, weights))
    assert [key for key, _ in found] == [(g,) for g in sorted(frame.g.unique())]
    for (g,), sums in found:
        part = expected.loc[g]
        np.testing.assert_allclose(sums.values, part.v)
        np.testing.assert_allclose(sums.weights, part.w)
        np.testing.assert_array_equal(sums.runs, part.n)


def test_no_runs() -> None:
    empty = runs_of(2).iloc[:0]
    row = detection_rate(empty).iloc[0]
    assert (row.n, row.successes) == (0, 0)
    assert row[["rate", "low", "high", "wilson_low", "exact_high"]].isna().all()
    assert detection_rate(empty, "layer").empty


def test_weighted_rates_are_hajek_estimates() -> None:
    weights, seen = [0.5, 0.5, 0.5, 3.0, 1.0, 0.5], [True, True, True, False, False, True]
    runs = runs_of(6, sampling_weight=weights, violation_detected=seen, batch_index=range(6))
    row = detection_rate(runs).iloc[0]
    assert row.rate == pytest.approx(hajek(np.array(seen, float), weights)[0])
    assert (row.successes, row.n) == (4, 6)
    assert row.low < row.rate < row.high
    assert row.method.startswith("ratio, ")
    with pytest.raises(UsageError, match=r"sampling_weight: got -1\.0 in 1 runs"):
        detection_rate(runs.assign(sampling_weight=[-1.0, 1, 1, 1, 1, 1]))


def test_false_positives() -> None:
    clean = pd.DataFrame({
        "baseline": list("ababab"), "detector": ["s@w", "s@w", "ranger", "ranger", "oracle_comb", "KV"],
        "proved": [True, True, False, False, True, True], "applicable": [True] * 5 + [False],
        "rows_checked": [600, 400, 10, 10, 50, 0], "violations": [0, 0, 3, 0, 5, 0],
    })  # fmt: skip
    assert false_positive_rate(clean)[["successes", "n"]].values.tolist() == [[0, 1000]]
    table = false_positive_rate(clean, "detector").set_index("detector")
    assert table.n.to_dict() == {"ranger": 20, "s@w": 1000}
    assert table.successes.to_dict() == {"ranger": 3, "s@w": 0}
    assert round(table.wilson_high["s@w"], 4) == 0.0038
    assert table.high["s@w"] > 0.5, "two passes tell little about the next one"


def aimed(
    generator: np.random.Generator, runs: int, rate: float = 0.04, share: float = 0.05
) -> tuple[pd.DataFrame, float]:
    """Return draws by aim from a population in which harm is nearly all in a small part that is drawn half the time."""
    risky = generator.random(runs) < 0.5
    weights = np.where(risky, share / 0.5, (1 - share) / 0.5)
    chances = np.where(risky, 0.99 * rate / share, 0.01 * rate / (1 - share))
    outcome = np.where(generator.random(runs) < chances, "critical", "benign")
    frame = runs_of(runs, sampling_weight=weights, outcome=outcome, bit=risky.astype(int),
                    batch_index=generator.integers(0, 200, runs))  # fmt: skip
    return frame, rate


def test_weighted_draws_give_narrower_limits_than_uniform_ones_and_hold() -> None:
    generator, held, widths = np.random.default_rng(4), 0, []
    for _ in range(120):
        runs, truth = aimed(generator, 2000)
        row = critical_rate(runs).iloc[0]
        held += row.low <= truth <= row.high
        uniform = wilson_interval(round(truth * len(runs)), len(runs))
        widths.append((uniform[1] - uniform[0]) / (row.high - row.low))
    assert row.method.startswith("regression, ")
    assert np.mean(widths) > 5**0.5
    assert held >= 120 * 0.95 - 3 * (120 * 0.95 * 0.05) ** 0.5


def test_the_regression_is_for_all_that_was_drawn_and_the_ratio_for_parts_of_it() -> None:
    runs, _ = aimed(np.random.default_rng(5), 2000)
    harm = (runs.outcome == "critical").to_numpy(float)
    expected, _ = regression(harm, runs.sampling_weight.to_numpy())
    assert critical_rate(runs).rate[0] == pytest.approx(expected, rel=1e-12)
    swept = critical_rate(runs.assign(**{"run.scope": ["full", "full", "site", "site"] * 500}), "run.scope")
    assert [method.split(",")[0] for method in swept.method] == ["regression"] * 2
    parts = critical_rate(runs, "bit")
    assert [method.split(",")[0] for method in parts.method] == ["ratio"] * 2
    assert parts.rate[1] == pytest.approx(harm[runs.bit == 1].mean())
    chosen = runs[(runs.bit == 1) | (runs.index < 100)]
    assert critical_rate(chosen).method[0].startswith("ratio, "), "the mean weight of what was selected is not 1"


def test_weights_of_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="sampling_weight: got 0 in all 4 runs"):
        critical_rate(runs_of(4, sampling_weight=0.0))


def swept_detectors(**values: object) -> pd.DataFrame:
    """Return two faults that each of two settings looked at; a setting sees all or nothing."""
    return runs_of(4, fault_id=list("aabb"), outcome=["critical"] * 2 + ["benign"] * 2, layer=[0, 0, 1, 1],
                   violation_detected=[True, False] * 2, **{"detect.detectors": ["x", "y"] * 2}, **values)  # fmt: skip


def test_harm_counts_a_fault_once_for_all_detectors_that_look() -> None:
    runs = swept_detectors()
    assert critical_rate(runs)[["successes", "n"]].values.tolist() == [[1, 2]]
    assert outcome_rates(runs).n.tolist() == [2] * 4
    assert critical_rate(runs, "detect.detectors").n.tolist() == [2, 2]
    assert rank_cells(runs).n.tolist() == [1, 1]
    harsher = runs.rename(columns={"detect.detectors": "detect.critical_loss"})
    assert critical_rate(harsher).n.tolist() == [4], "what is critical is another question"


def test_weighted_draws_count_once_for_all_detectors_that_look() -> None:
    runs = swept_detectors(sampling_weight=[0.5, 0.5, 2.0, 2.0], repeat=[0, 0, 1, 1])
    row = critical_rate(runs).iloc[0]
    assert (row.successes, row.n, row.rate) == (1, 2, pytest.approx(0.2))


@pytest.mark.parametrize("rate", [detection_rate, coverage_of_critical])
def test_what_was_seen_is_that_of_one_setting(rate: Any) -> None:
    runs = swept_detectors()
    with pytest.raises(UsageError, match=r"detect\.detectors: got runs with x, y, allowed runs of one value"):
        rate(runs)
    assert rate(runs, "detect.detectors").rate.tolist() == [1.0, 0.0]
    assert rate(runs[runs["detect.detectors"] == "x"]).rate.tolist() == [1.0]
