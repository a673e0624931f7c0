"""Padding is no place for a fault, and points of a grid that differ in detectors alone have the same faults."""

import csv
from pathlib import Path

import torch
from zoo import ZOO

from experiments.command_line import main
from experiments.config import ExperimentConfig
from experiments.plan.plan import make_plan
from experiments.runner import CompleteExperimentRunner
from fault_injection import SiteSurvey, patched, tapped

LENGTH, REAL = 12, 7


def padded_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 40, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, REAL:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def test_sites_leave_padding_out():
    model, batch = ZOO["llama-gqa"].build(), padded_batch()
    real = batch["attention_mask"].bool()
    with patched(model), torch.no_grad():
        survey = SiteSurvey(torch.float32, real_queries=real)
        with tapped(model, survey):
            model(**batch)
    for location in ("q", "out", "k", "v"):
        visible = survey.site(0, location).visible
        assert torch.equal(visible.squeeze(-1).squeeze(1), real), location
    for location in ("scores", "weights"):
        site = survey.site(0, location)
        assert not site.visible[1, :, REAL:].any()
        assert not site.visible[1, :, :, REAL:].any()
        assert site.sees((1, 0, REAL - 1, 0))


def test_without_padding_every_query_and_key_is_a_site():
    model = ZOO["llama-gqa"].build()
    with patched(model), torch.no_grad():
        survey = SiteSurvey(torch.float32, real_queries=torch.ones(2, LENGTH, dtype=torch.bool))
        with tapped(model, survey):
            model(input_ids=padded_batch()["input_ids"])
    assert all(survey.site(0, location).visible is None for location in ("q", "k", "v", "out"))


def test_no_run_hits_padding_unless_asked_for():
    model = ZOO["llama-gqa"].build()
    for location in ("q", "k", "v", "scores", "weights", "out"):
        config = ExperimentConfig(injection_location=location, injection_bit=30, num_runs=30, detectors=["finite"])
        for result in CompleteExperimentRunner(config).run_all(model, [padded_batch()]):
            assert not result.masked_position
            if result.index_batch == 1:
                assert result.index_row < REAL, location


def test_points_that_differ_in_detectors_alone_draw_the_same():
    plan = make_plan(ExperimentConfig(num_runs=3, sweep={"detect.tolerance": [0.0, 1.0]}))
    first, second = plan.runs[:3], plan.runs[3:]
    assert not {run.run_id for run in first} & {run.run_id for run in second}
    assert [run.draw_id for run in first] == [run.draw_id for run in second]
    plain = make_plan(ExperimentConfig(num_runs=3))
    assert [run.run_id for run in plain.runs] == [run.draw_id for run in first]


def test_every_point_of_a_detector_sweep_has_its_own_table_and_clean_rows(tmp_path: Path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--num_runs", "2", "--fault.location", "weights", "--fault.bit", "26"]
    arguments += ["--data.num_samples", "1", "--data.seq_len", "16", "--sweep.detect.tolerance", "0,1e30"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("2 runs, 2 distinct faults") == 2
    assert "== detect.tolerance = 0.0" in said
    with (tmp_path / "default" / "clean.csv").open() as stream:
        tolerances = {row["tolerance"] for row in csv.DictReader(stream)}
    assert tolerances == {"0.0", "1e+30"}
    with (tmp_path / "default" / "runs.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["fault_id"] for row in rows}) == 2
