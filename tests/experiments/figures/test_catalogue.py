"""Every figure of the catalogue: drawn, captioned, refused with a reason, the same bytes every time, small."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from figure_frames import synthetic_runs, synthetic_tables
from matplotlib.figure import Figure

from experiments.analysis import detector_comparison
from experiments.figures import FIGURES, NoDataError, save, svg_text, write_figures
from experiments.figures.__main__ import main, page

SITE = {
    "scope": "site", "outcome": None, "loss_diff": float("nan"), "local_change": 0.25,
    "baseline_loss": 1.5,
}  # fmt: skip
OF_SITE = {"local_change_by_bit"}
OF_OUTCOMES = {"outcomes_by_location", "loss_change_by_bit"}


@pytest.mark.parametrize("name", sorted(set(FIGURES) - OF_SITE))
def test_a_figure_is_drawn_with_a_caption_that_holds_its_n(name):
    figure, caption = FIGURES[name].make(synthetic_tables(600))
    assert isinstance(figure, Figure)
    assert "n = 600 distinct faults of 600 runs" in caption
    assert "reference (float32)" in caption
    assert all(axes.has_data() or not axes.axison for axes in figure.axes)


@pytest.mark.parametrize("name", sorted(set(FIGURES) - OF_OUTCOMES))
def test_a_campaign_without_propagated_runs_draws_what_it_can(name):
    figure, caption = FIGURES[name].make(synthetic_tables(300, **SITE))
    assert figure.axes
    assert "n = 300" in caption
    if name not in ("propagation_by_outcome", "propagation_by_location", "overhead_breakdown"):
        assert "0 of them propagated" in caption


@pytest.mark.parametrize("name", sorted(OF_OUTCOMES))
def test_what_is_about_outcomes_says_that_no_run_was_propagated(name):
    with pytest.raises(NoDataError, match="no run of this campaign was propagated"):
        FIGURES[name].make(synthetic_tables(50, **SITE))


@pytest.mark.parametrize(
    ("name", "fixed", "reason"),
    [
        ("rates_by_bit", {"bit": None}, "none of the 60 runs has a fault of exactly one bit"),
        ("location_bit_map", {"bit": None}, "none of the 60 runs has a fault of exactly one bit"),
        ("layer_head_map", {"index_head": None}, "none of the 60 runs hit an element of one head"),
        ("epsilon_bounds", {"epsilon_lower": float("nan")}, "epsilon_lower is empty in all 60 runs"),
        ("margin_distribution", {"epsilon_margin": float("nan")}, "no epsilon margin in this campaign"),
        ("loss_change_by_bit", {"baseline_loss": float("nan")}, "no loss in this campaign"),
        ("local_change_by_bit", {}, "every run was propagated"),
        ("overhead_breakdown", {"injection_seconds": float("nan")}, "no timing in this campaign"),
    ],
)
def test_missing_data_gives_the_reason(name, fixed, reason):
    with pytest.raises(NoDataError, match=reason):
        FIGURES[name].make(synthetic_tables(60, **fixed))


def test_a_campaign_of_an_older_schema_is_told_which_column_it_lacks():
    tables = synthetic_tables(30)
    tables["runs"] = tables["runs"].drop(columns="epsilon")
    with pytest.raises(NoDataError, match="its runs have no column epsilon"):
        FIGURES["epsilon_bounds"].make(tables)


@pytest.mark.parametrize("name", ["propagation_by_outcome", "propagation_by_location"])
def test_propagation_that_was_not_measured_or_is_of_other_runs(name):
    tables = synthetic_tables(30)
    with pytest.raises(NoDataError, match=r"no propagation\.csv"):
        FIGURES[name].make({**tables, "propagation": tables["propagation"].iloc[:0]})
    with pytest.raises(NoDataError, match="belongs to a run"):
        FIGURES[name].make({**tables, "propagation": tables["propagation"].assign(run_id="other")})


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_no_finished_run_is_a_reason(name):
    with pytest.raises(NoDataError, match="no finished run"):
        FIGURES[name].make(synthetic_tables(0))


@pytest.mark.parametrize("name", ["rates_by_bit", "layer_head_map", "margin_distribution", "propagation_by_outcome"])
def test_equal_figures_are_equal_files(name, tmp_path):
    tables = synthetic_tables(200)
    texts = [svg_text(FIGURES[name].make(tables)[0]) for _ in range(2)]
    assert texts[0] == texts[1]
    assert "<dc:date>" not in texts[0]
    pictures = [save(FIGURES[name].make(tables)[0], tmp_path / str(i))[1].read_bytes() for i in range(2)]
    assert pictures[0] == pictures[1]


def test_the_settings_of_matplotlib_are_neither_used_nor_changed():
    tables = synthetic_tables(100)
    expected = svg_text(FIGURES["rates_by_bit"].make(tables)[0])
    with matplotlib.rc_context({"font.size": 30.0, "svg.fonttype": "none", "svg.hashsalt": "another"}):
        before = dict(matplotlib.rcParams)
        assert svg_text(FIGURES["rates_by_bit"].make(tables)[0]) == expected
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_loaded():
    code = "import sys, experiments.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    figure, _ = FIGURES["rates_by_bit"].make(synthetic_tables(50))
    genuine = figure.savefig

    def torn(target, **options):
        if options["format"] == "png":
            Path(target).write_bytes(b"half a picture")
            raise OSError("disk full")
        genuine(target, **options)

    monkeypatch.setattr(figure, "savefig", torn)
    with pytest.raises(OSError, match="disk full"):
        save(figure, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_a_name_with_a_dot_keeps_it(tmp_path):
    figure, _ = FIGURES["rates_by_bit"].make(synthetic_tables(50))
    assert [path.name for path in save(figure, tmp_path / "v1.2")] == ["v1.2.svg", "v1.2.png"]


def artists(figure: Figure) -> int:
    return len(figure.findobj())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FIGURES) - OF_SITE))
def test_more_runs_are_not_more_marks(name):
    small, large = synthetic_tables(5_000), synthetic_tables(40_000)
    few, many = FIGURES[name].make(small)[0], FIGURES[name].make(large)[0]
    assert artists(many) <= 1.3 * artists(few)
    assert len(svg_text(many)) < 300_000


@pytest.mark.slow
def test_a_million_runs_are_drawn_in_small_files():
    tables = synthetic_tables(1_000_000)
    for name in sorted(set(FIGURES) - OF_SITE):
        figure, caption = FIGURES[name].make(tables)
        assert "1,000,000" in caption
        assert artists(figure) < 6_000, name
        assert len(svg_text(figure)) < 300_000, name


@pytest.mark.parametrize(
    "fixed",
    [
        pytest.param({"bit": 27}, id="one bit", marks=pytest.mark.slow),
        pytest.param({"layer": 2, "layer_depth": "late", "index_head": 0}, id="one layer", marks=pytest.mark.slow),
        pytest.param({"outcome": "benign"}, id="no harm", marks=pytest.mark.slow),
        pytest.param({"outcome": "masked", "loss_diff": 0.0}, id="all masked"),
        pytest.param(
            {"outcome": "nonfinite", "loss_diff": float("nan"), "epsilon_margin": float("-inf")}, id="all non-finite"
        ),
        pytest.param({"location": "v", "kind": "zero"}, id="one location", marks=pytest.mark.slow),
        pytest.param(
            {"epsilon": 1e37, "epsilon_lower": -1e30, "epsilon_upper": 1e30, "epsilon_margin": -1e37},
            id="far outside",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_uniform_campaigns_are_drawn_without_a_complaint(fixed, recwarn):
    tables = synthetic_tables(120, **fixed)
    for name in sorted(set(FIGURES) - OF_SITE):
        assert len(svg_text(FIGURES[name].make(tables)[0])) < 300_000, name
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_detectors_under_several_settings_are_not_compared():
    tables = synthetic_tables(40)
    tables["runs"] = tables["runs"].assign(**{"detect.tolerance": [0.0, 1.0] * 20})
    with pytest.raises(NoDataError, match=r"detect\.tolerance: got runs with"):
        FIGURES["detector_recall"].make(tables)


def test_a_single_run_is_drawn():
    for name in sorted(set(FIGURES) - OF_SITE):
        svg_text(FIGURES[name].make(synthetic_tables(1))[0])


def test_writing_all_of_them_reports_files_and_reasons(tmp_path):
    written = list(write_figures(synthetic_tables(100), tmp_path / "out"))
    assert [entry.name for entry in written] == list(FIGURES)
    missing = [entry for entry in written if not entry.files]
    assert [entry.name for entry in missing] == ["local_change_by_bit"]
    assert "run.scope = full" in missing[0].reason
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    drawn = sorted(set(FIGURES) - OF_SITE)
    assert names == sorted(f"{name}.{kind}" for name, kind in itertools.product(drawn, ("svg", "png")))
    text = page(written)
    assert re.findall(r"\]\((.*?)\.svg\)", text) == [name for name in FIGURES if name not in OF_SITE]
    assert "Not drawn: every run was propagated" in text


def test_the_command_refuses_what_is_no_campaign(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 3
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path), "--out", str(tmp_path / "file")]) == 2
    assert "which is a file" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.figures.__main__.load_tables", lambda _: synthetic_tables(40))
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path), "--out", str(tmp_path / "file" / "below")]) == 3
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: .*file.*\n", printed)


def test_a_campaign_named_by_its_table_has_its_figures_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.figures.__main__.load_tables", lambda _: synthetic_tables(40))
    monkeypatch.setattr("experiments.figures.__main__.write_figures", lambda tables, out: iter(()))
    (tmp_path / "runs.csv").write_text("")
    assert main([str(tmp_path / "runs.csv")]) == 0
    assert (tmp_path / "figures" / "figures.md").is_file()
    assert str(tmp_path / "figures") in capsys.readouterr().out


def test_a_comparison_that_is_made_already_is_taken(monkeypatch):
    tables = synthetic_tables(200)
    alone = FIGURES["detector_recall"].make(tables)
    compared = detector_comparison(tables["runs"], tables["clean"])
    monkeypatch.setattr("experiments.figures.detectors.detector_comparison", None)
    figure, caption = FIGURES["detector_recall"].make({**tables, "compared": compared})
    assert (svg_text(figure), caption) == (svg_text(alone[0]), alone[1])


def test_runs_of_several_bits_are_counted_where_they_are_not_drawn():
    runs = synthetic_runs(100)
    runs.loc[:9, "bit"] = pd.NA
    caption = FIGURES["rates_by_bit"].caption(runs)
    assert "10 runs of several bits or none are not drawn" in caption


def test_pooled_points_of_the_grid_are_named():
    runs = synthetic_runs(100).assign(**{"detect.tolerance": [0.0, 1.0] * 50})
    assert "pooled over 2 values of detect.tolerance" in FIGURES["rates_by_bit"].caption(runs)


def test_weighted_draws_are_named():
    caption = FIGURES["rates_by_bit"].caption(synthetic_runs(100, sampling_weight=[0.5, 1.5] * 50))
    assert "drawn with unequal probabilities: rates and means are weighted" in caption
    assert "unequal" not in FIGURES["rates_by_bit"].caption(synthetic_runs(100))


def test_detectors_without_outcomes_do_not_claim_that_none_was_harmful():
    tables = synthetic_tables(60, **SITE)
    caption = FIGURES["detector_recall"].caption(tables["runs"], tables["clean"])
    assert "harm is not known" in caption
    assert "None was harmful" not in caption
