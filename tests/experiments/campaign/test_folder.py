from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lock_holders import write_dead_holder, write_holder
from micro_campaign import files_below, table

from experiments.campaign.folder import CampaignFolder
from experiments.config import DetectConfig, ExperimentConfig, RunConfig, SlurmConfig
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.plan.plan import make_plan
from experiments.tables.csv_file import write_rows
from experiments.tables.schema import ExperimentResult, cells, columns


def config_in(tmp_path: Path, **changes: Any) -> ExperimentConfig:
    axes = {"fault.bit": [3, [0, 31]]}
    # The base value of a swept field is the first of its axis, as it is when a configuration is read.
    return ExperimentConfig(**{"name": "x", "output_dir": str(tmp_path), "injection_bit": 3, "sweep": axes, **changes})


def begun(tmp_path: Path, **changes: Any) -> CampaignFolder:
    config = config_in(tmp_path, **changes)
    folder = CampaignFolder.of(config)
    folder.begin(config, make_plan(config))
    return folder


def test_a_campaign_begins_with_its_configuration_and_its_plan(tmp_path: Path) -> None:
    config = config_in(tmp_path, num_runs=2)
    plan = make_plan(config)
    folder = CampaignFolder.of(config)
    folder.begin(config, plan)
    assert folder.path == tmp_path / "x"
    assert files_below(folder.path) == ["config.yaml", "plan.csv"]
    assert folder.config() == config
    rows = table(folder.file("plan.csv"))
    assert [row["run_id"] for row in rows] == [run.run_id for run in plan.runs]
    assert [(row["repeat"], row["fault.bit"]) for row in rows] == [
        ("0", "3"),
        ("1", "3"),
        ("0", "[0,31]"),
        ("1", "[0,31]"),
    ]


def test_an_existing_campaign_is_found_and_a_missing_one_is_a_missing_resource(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    assert CampaignFolder.existing(str(folder.path)) == folder
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingResourceError, match=r"no campaign here \(no config\.yaml\)"):
            CampaignFolder.existing(path)


# ------------------------------------------------------------------------------------------------- the same campaign


def test_the_same_configuration_goes_on(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.check_same(config_in(tmp_path))


@pytest.mark.parametrize("changes", [{"output_dir": "elsewhere/.."}, {"slurm": SlurmConfig(partition="gpu")}], ids=str)
def test_where_and_how_it_runs_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    begun(tmp_path).check_same(config_in(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 5}, r"seed \(0 -> 5\)"),
        ({"num_runs": 3}, r"num_runs \(1 -> 3\)"),
        ({"injection_location": "q"}, r"fault\.location \('scores' -> 'q'\)"),
        ({"detect": DetectConfig(tolerance=0.5)}, r"detect\.tolerance \(0\.0 -> 0\.5\)"),
        ({"run": RunConfig(threads=2)}, r"run\.threads \(1 -> 2\)"),
        ({"seed": 5, "injection_bit": 7}, r"seed \(0 -> 5\)"),
        ({"sweep": {"fault.bit": [3, [0, 31]], "seed": [0]}}, r"sweep\.seed \(None -> \[0\]\)"),
        ({"sweep": {}}, r"sweep\.fault\.bit \(\[3, \[0, 31\]\] -> None\)"),
    ],
    ids=str,
)
def test_another_configuration_is_refused_with_what_differs(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=rf"another configuration: {named}; choose another name or --overwrite"):
        begun(tmp_path).check_same(config_in(tmp_path, **changes))


def test_another_order_of_axes_is_refused_or_keeps_the_columns_of_the_plan(tmp_path: Path) -> None:
    folder = begun(tmp_path, sweep={"fault.bit": [3], "seed": [0, 1]})
    folder.check_same(config_in(tmp_path, sweep={"seed": [0, 1], "fault.bit": [3]}))
    assert list(table(folder.file("plan.csv"))[0]) == ["run_id", "repeat", "fault.bit", "seed"]


def test_a_folder_that_is_no_campaign_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is no campaign"):
        CampaignFolder(tmp_path / "x").check_same(config_in(tmp_path))
    assert files_below(tmp_path / "x") == ["thesis.tex"]


def test_a_folder_in_which_another_shard_is_just_starting_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "x" / "shards").mkdir(parents=True)
    CampaignFolder(tmp_path / "x").check_same(config_in(tmp_path))


# ------------------------------------------------------------------------------------------------- writable


def test_a_folder_that_can_be_made_is_not_made_by_asking(tmp_path: Path) -> None:
    CampaignFolder(tmp_path / "a" / "b" / "x").check_writable()
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("below", ["file/x", "file/a/b/x", "file"])
def test_a_path_below_a_regular_file_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written \(.*file is not a writable folder\)"):
        CampaignFolder(tmp_path / below).check_writable()


def test_a_file_in_the_place_of_the_shards_is_found_before_anything_runs(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.shards.write_text("")
    with pytest.raises(UsageError, match="shards is not a writable folder"):
        folder.check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written"):
        CampaignFolder(tmp_path / "x").check_writable()
    tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------------------------- overwriting


def test_clearing_removes_everything_but_the_own_lock(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    own = folder.shards / "0001.lock"
    write_holder(own)
    for name in ("runs.csv", "shards/0001.csv", "shards/0002.failures.csv", "trace/0001.jsonl", "logs/a.txt"):
        folder.file(name).parent.mkdir(exist_ok=True)
        folder.file(name).write_text("")
    folder.clear(own)
    assert files_below(folder.path) == ["shards", "shards/0001.lock"]


def test_clearing_is_refused_while_another_process_writes(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    write_holder(folder.shards / "0002.lock")
    before = files_below(folder.path)
    with pytest.raises(CheckRefusedError, match=r"0002\.lock shows that another process is writing there"):
        folder.clear(folder.shards / "0001.lock")
    with pytest.raises(CheckRefusedError, match=r"0002\.lock"):
        folder.clear_all()
    assert files_below(folder.path) == before


def test_the_lock_of_a_dead_process_does_not_forbid_to_overwrite(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    write_dead_holder(folder.shards / "0001.lock")
    folder.clear_all()
    assert set(files_below(folder.path)) <= {"shards"}


def test_clearing_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    CampaignFolder(tmp_path / "x").clear_all()
    assert files_below(tmp_path) == []


def test_overwriting_never_removes_files_that_no_campaign_made(tmp_path: Path) -> None:
    # `--output_dir ~ --name Documents --overwrite` must not end a career.
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    folder = CampaignFolder(tmp_path / "x")
    with pytest.raises(UsageError, match=r"x holds thesis\.tex, which no campaign made"):
        folder.clear_all()
    assert (tmp_path / "x" / "thesis.tex").exists()


def test_what_a_killed_writer_left_half_written_is_ours(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.file(f".runs.csv.{'0a' * 16}.tmp").write_text("half")
    folder.clear_all()
    assert set(files_below(folder.path)) <= {"shards"}
    for name in (f".thesis.tex.{'0a' * 16}.tmp", ".runs.csv.tmp", f"runs.csv.{'0a' * 16}.tmp"):
        folder.file(name).write_text("years of work")
        with pytest.raises(UsageError, match="which no campaign made"):
            folder.clear_all()
        folder.file(name).unlink()


@pytest.mark.parametrize("linked", [False, True])
def test_a_campaign_that_is_replaced_is_back_if_that_fails(tmp_path: Path, linked: bool) -> None:
    folder = begun(tmp_path)
    if linked:
        folder.path.rename(tmp_path / "elsewhere")
        folder.path.symlink_to(tmp_path / "elsewhere")
    folder.file("runs.csv").write_text("old")
    before = files_below(tmp_path)

    def fail() -> None:
        with folder.replaced():
            assert not folder.config_file.exists()
            folder.file("runs.csv").parent.resolve().mkdir(exist_ok=True)
            folder.file("plan.csv").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files_below(tmp_path) == before
    assert folder.file("runs.csv").read_text() == "old"
    with folder.replaced():
        folder.path.resolve().mkdir(exist_ok=True)
        folder.file("plan.csv").write_text("new")
    assert files_below(folder.path) == ["plan.csv"]
    assert not [name for name in files_below(tmp_path) if ".old-" in name]


def test_what_may_not_be_removed_is_not_put_aside(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    before = files_below(tmp_path)
    folder.file("thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"), folder.replaced():
        pytest.fail("it began")
    folder.file("thesis.tex").unlink()
    write_holder(folder.shards / "0002.lock")
    with pytest.raises(CheckRefusedError, match=r"0002\.lock"), folder.replaced():
        pytest.fail("it began")
    assert set(before) <= set(files_below(tmp_path))


# ------------------------------------------------------------------------------------------------- shards


def test_shard_files_are_told_apart_by_their_kind(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.shards.mkdir()
    for name in (
        "0002.csv",
        "0001.csv",
        "0001.detections.csv",
        "0001.failures.csv",
        "0001.json",
        "notes.csv",
        "0001.lock",
    ):
        (folder.shards / name).write_text("")
    assert [path.name for path in folder.shard_files()] == ["0001.csv", "0002.csv"]
    assert [path.name for path in folder.shard_files(".failures")] == ["0001.failures.csv"]


def test_shards_beyond_four_digits_are_found(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    header = columns(ExperimentResult)
    write_rows(folder.shards / "12345.csv", header, [cells(ExperimentResult(run_id="a"))])
    assert folder.finished_runs() == {"a"}


def test_finished_runs_are_the_complete_rows_of_all_shards(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    header = columns(ExperimentResult)
    for name, run_ids in (("0001", "ab"), ("0002", "c")):
        write_rows(
            folder.shards / f"{name}.csv", header, [cells(ExperimentResult(run_id=run_id)) for run_id in run_ids]
        )
    with (folder.shards / "0002.csv").open("a") as stream:
        stream.write("d,0,")
    assert folder.finished_runs() == {"a", "b", "c"}


# ------------------------------------------------------------------------------------------------- beginning


@pytest.mark.parametrize("killed_at", ["config.yaml", "plan.csv"])
def test_a_beginning_that_was_cut_short_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    config = config_in(tmp_path)
    folder, plan = CampaignFolder.of(config), make_plan(config)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == killed_at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        folder.begin(config, plan)
    monkeypatch.undo()
    assert [name for name in files_below(folder.path) if name.endswith(".tmp")], "as a kill would leave it"
    folder.check_same(config)
    folder.begin(config, plan)
    assert {"config.yaml", "plan.csv"} <= set(files_below(folder.path))
    folder.clear_all()
    assert set(files_below(folder.path)) <= {"shards"}


def test_the_configuration_is_there_before_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(tmp_path)
    folder, real, seen = CampaignFolder.of(config), os.replace, []

    def replace(source: Any, target: Any) -> None:
        # Another shard arrives.
        folder.check_same(config)
        seen.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    folder.begin(config, make_plan(config))
    assert seen == ["config.yaml", "plan.csv"]
    folder.begin(config, make_plan(config))
    assert len(seen) == 2, "nothing is written again"


def test_a_plan_or_logs_alone_are_no_other_campaign_and_a_table_is(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    folder = CampaignFolder.of(config)
    folder.file("logs").mkdir(parents=True)
    folder.file("plan.csv").write_text("")
    folder.check_same(config)
    folder.file("runs.csv").write_text("")
    with pytest.raises(UsageError, match="exists and is no campaign"):
        folder.check_same(config)
