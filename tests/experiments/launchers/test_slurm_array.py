"""What is written and asked for by ``--launcher slurm``, with programs that answer like Slurm's."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from lock_holders import write_elsewhere
from micro_campaign import ROOT, MicroPlace, files_below

from experiments.campaign.folder import CampaignFolder
from experiments.command_line import main
from experiments.config import ExperimentConfig, SlurmConfig, load_config
from experiments.config.slurm_section import slurm_seconds
from experiments.errors import MissingResourceError, UsageError
from experiments.launchers import slurm as slurm_launcher
from experiments.launchers.slurm_scripts import BatchFiles, array_text, warning_seconds
from experiments.plan.plan import make_plan
from experiments.plan.shards import Shard, shard_of
from experiments.tables.csv_file import write_rows
from experiments.tables.schema import ExperimentResult, cells, columns

SLURM = ["--launcher", "slurm", "--workers", "4"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm.alone(tmp_path / "bin", monkeypatch)
    fake.program("sbatch", "812;big\n")
    fake.program("squeue")
    return fake


def finish(output: Path, arguments: list[str], shards: list[int], count: int) -> None:
    """Write the rows of some shards, as workers would."""
    plan = make_plan(load_config(arguments))
    for number in shards:
        rows = [cells(ExperimentResult(run_id=run.run_id)) for run in shard_of(plan, Shard(number, count))]
        write_rows(output / "micro" / "shards" / f"{number:04d}.csv", columns(ExperimentResult), rows)


def test_a_campaign_is_written_and_submitted(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main([*place.arguments(output), *SLURM, "--slurm.array_limit", "2"]) == 0
    folder = output / "micro"
    assert slurm.calls("sbatch") == [
        f"--parsable --array=1-4%2 {folder}/run.sbatch",
        f"--parsable --dependency=afterany:812 {folder}/merge.sbatch",
    ]
    assert set(files_below(folder)) == {
        *("config.yaml", "plan.csv", "run.sbatch", "merge.sbatch", "submission.json", "logs"),
    }
    submission = json.loads((folder / "submission.json").read_text())
    assert (submission["job"], submission["merge_job"]) == ("812", "812")
    assert (submission["workers"], submission["shards"]) == (4, [1, 2, 3, 4])
    said = capsys.readouterr().out
    for words in ("array job 812: 4 tasks (1-4%2) for 24 runs", f"status {folder}", "squeue -j 812", "scancel 812"):
        assert words in said


def test_only_shards_with_something_left_are_submitted(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [*place.arguments(output), *SLURM]
    assert main(arguments) == 0
    finish(output, place.arguments(output), [1, 3], 4)
    assert main(arguments) == 0
    assert slurm.calls("sbatch")[2].startswith("--parsable --array=2,4 ")
    finish(output, place.arguments(output), [2, 4], 4)
    assert main(arguments) == 0
    assert len(slurm.calls("sbatch")) == 4
    assert "all 24 runs are done" in capsys.readouterr().out


def test_a_dry_run_shows_the_scripts_and_needs_no_slurm(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeSlurm.alone(tmp_path / "bin", monkeypatch)
    arguments = place.arguments(tmp_path / "out")
    assert main([*arguments, *SLURM, "--dry-run"]) == 0
    said = capsys.readouterr().out
    files = BatchFiles(CampaignFolder(tmp_path / "out/micro"), load_config(arguments), 4)
    assert files.run() in said
    assert files.merge() in said
    assert "sbatch --parsable --array=1-4 " in said
    assert "nothing was written or submitted" in said
    assert not (tmp_path / "out").exists()


def test_without_slurm_the_program_that_is_missing_is_named_and_nothing_is_written(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeSlurm.alone(tmp_path / "bin", monkeypatch)
    assert main([*place.arguments(tmp_path / "out"), *SLURM]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_sweep.py: sbatch: not found")
    assert not (tmp_path / "out").exists()


def test_a_refusal_passes_on_what_slurm_says(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.program("sbatch", complains="sbatch: error: QOSMaxSubmitJobPerUserLimit\n", status=1)
    assert main([*place.arguments(tmp_path / "out"), *SLURM]) == 1
    assert "error: QOSMaxSubmitJobPerUserLimit" in capsys.readouterr().err
    assert not (tmp_path / "out/micro/submission.json").exists()


def test_a_campaign_that_is_still_queued_is_not_submitted_again(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*place.arguments(tmp_path / "out"), *SLURM]
    assert main(arguments) == 0
    slurm.program("squeue", "812_1 COMPLETED\n812_2 RUNNING\n812_3 PENDING\n")
    assert main(arguments) == 1
    assert "2 tasks of job 812 are waiting or running; let them end, or: scancel 812" in capsys.readouterr().err
    assert len(slurm.calls("sbatch")) == 2


def test_another_campaign_of_that_name_is_refused(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*place.arguments(tmp_path / "out"), *SLURM]
    assert main(arguments) == 0
    assert main([*arguments, "--seed", "4"]) == 2
    assert "seed (0 -> 4)" in capsys.readouterr().err
    write_elsewhere(tmp_path / "out/micro/shards/0001.lock", cluster="another")
    assert main([*arguments, "--seed", "4", "--overwrite"]) == 1
    (tmp_path / "out/micro/shards/0001.lock").unlink()
    assert main([*arguments, "--seed", "4", "--overwrite"]) == 0
    assert len(slurm.calls("sbatch")) == 4


def test_an_earlier_campaign_is_removed_when_slurm_has_taken_the_next_one(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [*place.arguments(output), *SLURM]
    assert main(arguments) == 0
    finish(output, place.arguments(output), [1, 2, 3, 4], 4)
    before = {name: (output / name).read_bytes() for name in files_below(output) if (output / name).is_file()}
    slurm.program("sbatch", complains="sbatch: error: invalid partition specified\n", status=1)
    again = [*arguments, "--seed", "4", "--overwrite"]
    assert main(again) == 1
    assert "invalid partition" in capsys.readouterr().err
    after = {name: (output / name).read_bytes() for name in files_below(output) if (output / name).is_file()}
    assert after == before
    slurm.program("sbatch", "900\n")
    assert main(again) == 0
    names = ("config.yaml", "logs", "merge.sbatch", "plan.csv", "run.sbatch", "submission.json")
    assert files_below(output) == ["micro", *(f"micro/{name}" for name in names)]


def test_a_job_that_nobody_knows_of_is_not_over(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*place.arguments(tmp_path / "out"), *SLURM]
    assert main(arguments) == 0
    slurm.program("squeue", complains="Unable to contact slurm controller\n", status=1)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "squeue does not say whether job 812 is over; wait until it answers, or delete " in said
    assert str(tmp_path / "out/micro/submission.json") in said
    assert len(slurm.calls("sbatch")) == 2
    slurm.program("squeue", complains="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert main(arguments) == 0


@pytest.mark.parametrize(("call", "fails"), [(1, False), (2, False), (2, True)])
def test_no_answer_to_a_submission(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, call: int, fails: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls = []

    def sbatch(program: str, *arguments: str, **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(arguments)
        if len(calls) == call and fails:
            return subprocess.CompletedProcess([], 1, "", "sbatch: error: no\n")
        if len(calls) == call:
            raise MissingResourceError("sbatch: no answer within 120 s")
        return subprocess.CompletedProcess([], 0, "812\n", "")

    monkeypatch.setattr(slurm_launcher, "ask", sbatch)
    assert main([*place.arguments(tmp_path / "out"), *SLURM]) == (1 if fails else 3)
    (line,) = capsys.readouterr().err.splitlines()
    record = tmp_path / "out/micro/submission.json"
    if call == 1:
        assert "whether Slurm took the array is not known: look with squeue --name=micro" in line
        assert not record.exists()
    else:
        assert "array job 812 was submitted, but not the merge behind it" in line
        assert json.loads(record.read_text())["job"] == "812"
        assert json.loads(record.read_text())["merge_job"] is None


@pytest.mark.parametrize("name", ['a "b"', "a\nb", "a\\b", "a\tb"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=str)
def test_a_path_that_no_script_can_say_is_refused(
    place: MicroPlace, slurm: FakeSlurm, tmp_path: Path, name: str, dry: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([*place.arguments(tmp_path / name), *SLURM, *dry]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output_dir and name: got" in line
    assert not (tmp_path / name).exists()
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert main([*place.arguments(tmp_path / "out"), *SLURM, *dry]) == 2
    assert "the current folder: got" in capsys.readouterr().err
    assert not slurm.calls("sbatch")


def test_workers_get_the_options_of_the_command(place: MicroPlace, slurm: FakeSlurm, tmp_path: Path) -> None:
    assert main([*place.arguments(tmp_path / "out"), *SLURM, "--grace", "33", "--quiet"]) == 0
    script = (tmp_path / "out/micro/run.sbatch").read_text()
    assert script.rstrip().endswith('--shard "$SLURM_ARRAY_TASK_ID/4" --grace 33 --quiet')


# ------------------------------------------------------------------------------------------------- scripts


def files(tmp_path: Path, **slurm: object) -> BatchFiles:
    config = ExperimentConfig(name="x", slurm=SlurmConfig(**slurm))  # type: ignore[arg-type]
    return BatchFiles(CampaignFolder(tmp_path / "a b%j" / "x"), config, 16)


def test_what_the_script_of_a_worker_says(tmp_path: Path) -> None:
    text = files(tmp_path, partition="gpu", time="4:00:00", gres="gpu:1", setup="module load cuda\n. env").run()
    lines = text.splitlines()
    folder = tmp_path / "a b%j" / "x"
    for line in (
        "#!/bin/bash", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@120",
        "#SBATCH --partition=gpu", "#SBATCH --time=4:00:00", "#SBATCH --gres=gpu:1", "#SBATCH --cpus-per-task=1",
        f'#SBATCH --output="{str(folder).replace("%", "%%")}/logs/slurm-%A_%a.out"',
    ):  # fmt: skip
        assert line in lines
    assert lines.index("module load cuda") + 1 == lines.index(". env") < len(lines) - 1
    command = shlex.split(lines[-1])
    assert command[:3] == ["exec", sys.executable, "-u"]
    assert command[3:] == [
        str(ROOT / "run_sweep.py"), "--config", str(folder / "config.yaml"), "--output_dir", str(folder.parent),
        "--shard", "$SLURM_ARRAY_TASK_ID/16", "--grace", "90",
    ]  # fmt: skip
    assert '"$SLURM_ARRAY_TASK_ID/16"' in lines[-1], "bash must see the variable"


def test_nothing_is_asked_for_that_was_not_configured(tmp_path: Path) -> None:
    text = files(tmp_path).run()
    assert not [word for word in ("partition", "time=", "gres", "set -e") if word in text]


def test_the_merge_runs_the_command_of_the_same_name(tmp_path: Path) -> None:
    lines = files(tmp_path, partition="cpu", gres="gpu:1", time="1:00").merge().splitlines()
    assert "#SBATCH --partition=cpu" in lines
    assert not [line for line in lines if "gres" in line or "--time" in line]
    assert shlex.split(lines[-1])[-2:] == ["merge", str(tmp_path / "a b%j" / "x")]


def test_how_runs_are_executed_may_change_from_one_submission_to_the_next(tmp_path: Path) -> None:
    begun = ExperimentConfig(name="x")
    folder = CampaignFolder(tmp_path / "x")
    folder.begin(begun, make_plan(begun))
    now = begun.with_field("run.engine", "plain").with_field("run.batch_runs", 7)
    assert "--run.engine plain --run.batch_runs 7 --shard" in BatchFiles(folder, now, 2).run()
    assert "--run." not in BatchFiles(folder, begun, 2).run()


@pytest.mark.parametrize(
    ("numbers", "text"), [([1], "1"), ([1, 2], "1-2"), ([2, 4], "2,4"), ([1, 2, 3, 7, 9, 10], "1-3,7,9-10")]
)
def test_array_texts(numbers: list[int], text: str) -> None:
    assert array_text(numbers) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("0:0:5", 5), ("2-0", 172800), ("1-12", 129600),
        ("1-0:30", 88200), ("1-0:30:05", 88205), ("unlimited", None), ("INFINITE", None),
        ("0", None), ("0:00:00", None),
    ],
)  # fmt: skip
def test_time_limits_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert slurm_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:", "1:2:3:4", "-5", "1d", "1 00", "1-", "4h"])
def test_time_limits_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"slurm\.time: got .*, allowed minutes"):
        SlurmConfig(time=text)


@pytest.mark.parametrize(
    ("time", "seconds"), [(None, 120), ("unlimited", 120), ("0", 120), ("60", 120), ("4", 60), ("0:01", 1)]
)
def test_the_warning_comes_well_before_a_short_limit(time: str | None, seconds: int) -> None:
    assert warning_seconds(time) == seconds


@pytest.mark.parametrize("wrong", ["a b", "a\n#SBATCH --x", "", "a#b"])
def test_a_partition_cannot_smuggle_lines_into_the_script(wrong: str) -> None:
    with pytest.raises(UsageError, match=r"slurm\.partition: got .*, allowed a text without blanks"):
        SlurmConfig(partition=wrong)
