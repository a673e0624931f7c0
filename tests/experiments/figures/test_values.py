"""What the artists of a figure hold are the numbers of the analysis, and those of an independent count."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from figure_frames import synthetic_clean, synthetic_propagation, synthetic_runs
from hypothesis import given
from hypothesis import strategies as st

from experiments.analysis import (
    critical_rate,
    detection_rate,
    detector_comparison,
    margin_statistics,
    outcome_rates,
    overhead,
)
from experiments.figures import (
    detector_recall,
    epsilon_bounds,
    fault_depth_map,
    layer_head_map,
    location_bit_map,
    loss_change_by_bit,
    margin_distribution,
    outcomes_by_location,
    overhead_breakdown,
    propagation_by_outcome,
    rates_by_bit,
)
from experiments.figures.drawing.quantiles import quantile_table
from experiments.figures.drawing.rate_map import cell_font
from experiments.figures.drawing.tensor_format import by_tensor_dtype
from experiments.figures.epsilon_interval import place_shares
from experiments.figures.margins import MarginBins, margin_histogram
from experiments.figures.propagation import propagation_quantiles
from experiments.tables.schema import OUTCOMES


def bars_of(container):
    """Return the middle and the lower and upper end of every error bar, in the order of the rows."""
    [segments] = [lines.get_segments() for lines in container[2]]
    line = container[0]
    ends = np.array([[segment[0], segment[1]] for segment in segments])
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float), ends


def test_rates_by_bit_are_those_of_the_analysis():
    runs = synthetic_runs(900)
    [axes] = rates_by_bit(runs).axes
    for container, rates in zip(
        axes.containers, (detection_rate(runs, "bit"), critical_rate(runs, "bit")), strict=True
    ):
        x, y, ends = bars_of(container)
        assert np.round(x).astype(int).tolist() == rates["bit"].tolist()
        np.testing.assert_array_equal(y, rates["rate"])
        np.testing.assert_allclose(ends[:, 0, 1], rates["low"], atol=1e-15)
        np.testing.assert_allclose(ends[:, 1, 1], rates["high"], atol=1e-15)


def test_tensors_of_two_dtypes_have_axes_of_their_own():
    half = synthetic_runs(200, dtype="bfloat16", bits_before="0x3f80")
    half["bit"] = half["bit"] % 16
    wide = synthetic_runs(100, seed=1, dtype="bfloat16", location="scores")
    both = pd.concat([half[half["location"] != "scores"], wide], ignore_index=True)
    parts = dict(by_tensor_dtype(both))
    assert {name: len(part) for name, part in parts.items()} == {
        "bfloat16": int((half["location"] != "scores").sum()), "float32": 100,
    }  # fmt: skip
    figure = rates_by_bit(both)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        f"bit of {name} (0: least significant)" for name in ("bfloat16", "float32")
    ]
    assert [len(axes.get_xticks()) for axes in figure.axes] == [16, 32]
    assert [text.get_text() for text in figure.axes[0].texts] == ["mantissa", "exponent", "sign"]


def test_repeated_indices_do_not_mix_the_dtypes():
    one = synthetic_runs(50)
    two = synthetic_runs(50, seed=1, model="other", dtype="bfloat16", bits_before="0x3f80", bit=3)
    parts = dict(by_tensor_dtype(pd.concat([one, two])))
    assert {name: len(part) for name, part in parts.items()} == {"float32": 50, "bfloat16": 50}


def images_of(figure):
    return [(axes.get_title(loc="left"), axes.images[0].get_array(), axes) for axes in figure.axes if axes.images]


@pytest.mark.parametrize(
    ("draw", "row", "column", "rows", "columns"),
    [
        (location_bit_map, "location", "bit", ["q", "k", "v", "scores", "weights", "out"], range(32)),
        (layer_head_map, "layer", "index_head", range(4), range(4)),
        (fault_depth_map, "location", "layer_depth", ["q", "k", "v", "scores", "weights", "out"],
         ["early", "mid", "late"]),
    ],
    ids=["location and bit", "layer and head", "fault and depth"],
)  # fmt: skip
def test_heat_maps_hold_the_rates_of_the_analysis(draw, row, column, rows, columns):
    runs = synthetic_runs(700)
    runs = runs[(runs["location"] != "k") | (runs["layer"] != 3)]
    harm, seen = (image for _, image, _ in images_of(draw(runs)))
    for image, rates in ((harm, critical_rate(runs, [row, column])), (seen, detection_rate(runs, [row, column]))):
        known = {(entry[row], entry[column]): entry["rate"] for entry in rates.to_dict("records")}
        for i, name in enumerate(rows):
            for j, value in enumerate(columns):
                if (name, value) in known:
                    assert image[i, j] == known[name, value]
                else:
                    assert np.ma.is_masked(image[i, j])


def test_cells_say_rate_and_n():
    runs = synthetic_runs(40, layer=1, index_head=[0, 1] * 20, violation_detected=[True] * 30 + [False] * 10)
    *_, (title, _, axes) = images_of(layer_head_map(runs))
    assert title == "detected"
    assert [text.get_text() for text in axes.texts] == ["75.0 %\nn=20", "75.0 %\nn=20"]


@pytest.mark.slow
def test_cells_that_are_too_small_stay_without_text():
    assert cell_font(0.1, 0.1, 3, 1) is None
    runs = synthetic_runs(30_000, layer=np.arange(30_000) % 96, index_head=np.arange(30_000) // 96 % 96)
    assert not any(axes.texts for _, _, axes in images_of(layer_head_map(runs)))


def test_outcomes_are_those_of_the_analysis():
    runs = synthetic_runs(500)
    [axes] = outcomes_by_location(runs).axes
    names = [label.get_text().split(" ")[0] for label in axes.get_yticklabels()]
    rates = outcome_rates(runs, "location").set_index(["location", "outcome"])["rate"]
    for outcome, container in zip(OUTCOMES, axes.containers, strict=True):
        assert [bar.get_width() for bar in container] == pytest.approx([rates[name, outcome] for name in names])
    last = axes.containers[-1]
    assert [bar.get_x() + bar.get_width() for bar in last] == pytest.approx([1.0] * len(names))


def test_detectors_are_those_of_the_analysis():
    runs, clean = synthetic_runs(400), synthetic_clean()
    clean.loc[clean["detector"] == "finite", "violations"] = 3
    axes = detector_recall(runs, clean).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    table = detector_comparison(runs, clean).set_index("detector").loc[names]
    drawn = {container.get_label(): container for container in axes.containers}
    for label, column in (("of harmful faults", "recall_critical"), ("of all faults", "detected")):
        x, _, ends = bars_of(drawn[label])
        np.testing.assert_array_equal(x, table[column])
        np.testing.assert_allclose(ends[:, 0, 0], table[f"{column}_low"], atol=1e-15)
        np.testing.assert_allclose(ends[:, 1, 0], table[f"{column}_high"], atol=1e-15)
    assert {"6 / 2,000", "0 / 2,000"} <= {text.get_text() for text in axes.texts}


def test_a_detector_that_applies_nowhere_says_so():
    clean = synthetic_clean()
    clean.loc[clean["detector"] == "finite", ["applicable", "rows_checked"]] = [False, 0]
    axes = detector_recall(synthetic_runs(100), clean).axes[0]
    assert "not applicable" in [text.get_text() for text in axes.texts]


def test_milliseconds_are_those_of_the_analysis():
    runs = synthetic_runs(300, correction_seconds=1e-4)
    axes = overhead_breakdown(runs).axes[0]
    table = overhead(runs, "location").set_index(["location", "part"])["mean"]
    every = overhead(runs).set_index("part")["mean"]
    names = [label.get_text().split(" (")[0] for label in axes.get_yticklabels()]
    for part, container in zip(("injection", "bounds", "detection", "correction"), axes.containers, strict=True):
        expected = [1e3 * (every[part] if name == "all runs" else table[name, part]) for name in names]
        assert [bar.get_width() for bar in container] == pytest.approx(expected)
    share = 100 * every["overhead"]
    assert axes.texts[names.index("all runs")].get_text().startswith(f"{share:.0f} %")


numbers = st.lists(st.sampled_from([0.0, 1e-9, 0.5, 2.0, 7.0, np.nan, np.inf, -np.inf]), min_size=1, max_size=30)


@given(numbers, st.booleans())
def test_quantiles_and_shares_against_numpy(values, nonzero):
    table = quantile_table(pd.DataFrame({"value": values, "key": "a"}), "value", "key", nonzero=nonzero).iloc[0]
    array = np.array(values)
    finite = array[np.isfinite(array)]
    used = finite[finite != 0] if nonzero else finite
    assert table["n"] == len(array)
    assert table["unchanged"] == np.mean(array == 0)
    assert table["nonfinite"] == np.mean(~np.isfinite(array))
    assert table["unchanged"] + table["changed"] + table["nonfinite"] == pytest.approx(1)
    for name, level in (("q05", 0.05), ("q25", 0.25), ("q50", 0.5), ("q75", 0.75), ("q95", 0.95), ("largest", 1.0)):
        np.testing.assert_allclose(table[name], np.quantile(used, level) if len(used) else np.nan, rtol=1e-12)


def test_changes_of_the_loss_by_bit():
    runs = synthetic_runs(8, bit=30, loss_diff=[0.0, -1e-3, 1e-1, 1e-2, np.nan, np.inf, 0.0, 1.0])
    runs["outcome"] = ["masked", "benign", "critical", "critical", "nonfinite", "nonfinite", "benign", "critical"]
    upper, lower = loss_change_by_bit(runs).axes
    [medians] = [line for line in upper.lines if line.get_gid() == "medians"]
    assert medians.get_xdata().tolist() == [30]
    assert medians.get_ydata()[0] == pytest.approx(np.median([1e-3, 1e-1, 1e-2, 1.0]))
    assert upper.get_yscale() == "log"
    assert [container[0].get_height() for container in lower.containers] == [0.25, 0.5, 0.25]


def test_a_fault_that_was_drawn_twice_counts_once():
    runs = synthetic_runs(4, bit=3, loss_diff=[1e-3, 1e-3, 1e-3, 1e-1], fault_id=["a", "a", "a", "b"], outcome="benign")
    upper, _ = loss_change_by_bit(runs).axes
    [medians] = [line for line in upper.lines if line.get_gid() == "medians"]
    assert medians.get_ydata()[0] == pytest.approx(np.median([1e-3, 1e-1]))


def test_places_between_the_bounds_by_hand():
    nan, inf = float("nan"), float("inf")
    rows = [
        (0, 0.01, 1), (0, 0.5, 1), (0, 1.0, 1), (0, -0.1, 1), (0, 1.1, 1), (0, 5.0, 1), (0, nan, 1), (0, 1, inf),
        (2, 2, 2), (0, 0.0, 1),
    ]  # fmt: skip
    shares = place_shares(pd.DataFrame(rows, columns=["epsilon_lower", "epsilon", "epsilon_upper"]))
    assert {name: round(10 * share) for name, share in shares.items() if share} == {
        "below": 1, "0": 2, "0.5": 2, "0.95": 1, "above": 2, "not finite": 2,
    }  # fmt: skip
    assert shares.sum() == pytest.approx(1)


def test_epsilon_and_its_bounds_by_layer():
    runs = synthetic_runs(300)
    left, right = epsilon_bounds(runs).axes
    lower, epsilon, upper = (line.get_ydata() for line in left.lines if line.get_gid() == "medians")
    expected = runs.groupby("layer")[["epsilon_lower", "epsilon", "epsilon_upper"]].median()
    for drawn, name in zip((lower, epsilon, upper), expected.columns, strict=True):
        np.testing.assert_allclose(drawn, expected[name])
    heights = [bar.get_height() for container in right.containers for bar in container]
    assert sum(heights) == pytest.approx(1)


def test_margins_fall_into_the_bins_that_hold_them():
    bins = MarginBins(linear=0.001, largest=1.0)
    values = [-5.0, -0.5, -0.002, -0.0001, 0.0, 0.0001, 0.002, 0.5, 1.0, 3.0, np.nan, np.inf]
    shares = margin_histogram(pd.DataFrame({"epsilon_margin": values}), bins)
    assert shares["less"] * 12 == pytest.approx(1)
    assert shares["more"] * 12 == pytest.approx(2)
    assert shares["not finite"] * 12 == pytest.approx(2)
    edges = bins.edges
    assert edges[0] == -4
    assert edges[-1] == 4
    for number, (low, high) in enumerate(itertools.pairwise(edges)):

        def decades(value):
            return value * 1000 if abs(value) <= 0.001 else np.sign(value) * (1 + np.log10(abs(value) / 0.001))

        inside = [v for v in values[:-2] if low <= decades(v) < high]
        assert shares[str(number)] * 12 == pytest.approx(len(inside))


def test_no_negative_margin_is_drawn_right_of_the_line():
    bins = MarginBins.around(np.array([-1e-300, -1e30, 1e-3, 0.2]))
    assert 0.0 in bins.edges
    assert (bins.place(np.array([-1e-300, -1e-3, -1e30])) < 0).all()


def test_margins_by_outcome_say_how_many_are_outside():
    runs = synthetic_runs(300)
    axes = margin_distribution(runs).axes
    expected = margin_statistics(runs, "outcome").set_index("outcome")
    for outcome, part in zip(OUTCOMES, axes, strict=True):
        row = expected.loc[outcome]
        assert part.get_title(loc="left") == (
            f"{outcome}: n = {int(row['n'])}; outside the bounds: {int(row['outside'])} of {int(row['outside_n'])} "
            "that are known"
        )
        assert sum(bar.get_height() for container in part.containers for bar in container) == pytest.approx(1)


def test_propagation_counts_blocks_from_the_one_that_was_hit():
    runs = synthetic_runs(3, layer=[0, 2, 2], outcome=["benign", "benign", "critical"], loss_diff=[1.0, 4.0, 8.0])
    table = propagation_quantiles(runs, synthetic_propagation(runs), "outcome")
    found = table.set_index(["outcome", "distance"])["q50"].to_dict()
    assert found == {
        ("benign", 0): 2.5, ("benign", 1): 5.0, ("benign", 2): 4.0, ("benign", 3): 8.0,
        ("critical", 0): 8.0, ("critical", 1): 16.0,
    }  # fmt: skip
    assert table.set_index(["outcome", "distance"])["n"].to_dict()["benign", 1] == 2


def test_propagation_of_campaigns_with_the_same_run_ids_is_not_mixed():
    one, two = synthetic_runs(20), synthetic_runs(20, seed=0, campaign="other", loss_diff=1.0)
    moved = pd.concat([synthetic_propagation(one), synthetic_propagation(two).assign(campaign="other")])
    both = pd.concat([one, two], ignore_index=True)
    table = propagation_quantiles(both, moved, "location")
    assert table[table["distance"] == 0]["n"].sum() == 40


def test_propagation_draws_the_shares_that_are_not_finite():
    runs = synthetic_runs(200)
    figure = propagation_by_outcome(runs, synthetic_propagation(runs))
    lower = dict(zip([axes.get_title().split("\n")[0] for axes in figure.axes[:4]], figure.axes[4:], strict=True))
    unchanged, changed, lost = (
        {name: [bar.get_height() for bar in axes.containers[place]] for name, axes in lower.items()}
        for place in range(3)
    )
    assert lost["nonfinite"] == [1.0] * 4
    assert unchanged["masked"] == [1.0] * 4
    assert changed["critical"] == [1.0] * 4
