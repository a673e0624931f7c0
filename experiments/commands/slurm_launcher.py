"""``--launcher slurm --workers N``: a campaign as an array job of workers and a merge job behind it.

Public names: ``launch_slurm``, ``print_scripts``.
"""

from __future__ import annotations

import shlex
import shutil
import time

from experiments.batch_files import BatchFiles, array_text
from experiments.campaign_folder import CampaignFolder
from experiments.config import ExperimentConfig
from experiments.csv_file import write_text
from experiments.errors import CheckRefusedError, MissingResourceError
from experiments.plan import Plan
from experiments.shards import shard_numbers
from experiments.slurm_task import ask, task_states
from experiments.submission import Submission

_WAITING_OR_RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING")


def launch_slurm(config: ExperimentConfig, plan: Plan, workers: int, *, overwrite: bool) -> int:
    """Write the plan and the scripts, submit them, say how to follow them, and return at once.

    Only shards with something left to do become tasks. The merge runs when all of them have ended, however they did.

    Raises:
        MissingResourceError: ``sbatch`` is not here.
        CheckRefusedError: Slurm refuses, in its own words; or an earlier submission of the campaign is not over.
        UsageError: the folder holds another campaign, or cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise MissingResourceError("sbatch: not found; --launcher slurm needs Slurm's programs on this machine")
    folder = CampaignFolder.of(config)
    folder.check_writable()
    _check_over(folder)
    if overwrite:
        folder.clear_all()
    folder.check_same(config)
    left = _shards_left(folder, plan, workers)
    if not left:
        print(f"all {len(plan.runs)} runs are done; then: run_sweep.py merge {folder.path}")
        return 0
    folder.begin(config, plan)
    files = BatchFiles(folder, config, workers)
    run, merge = folder.file("run.sbatch"), folder.file("merge.sbatch")
    write_text(run, files.run())
    write_text(merge, files.merge())
    folder.file("logs").mkdir(exist_ok=True)
    job = _submit(f"--array={_array(config, left)}", str(run))
    submission = Submission(job, None, workers, left, time.time())
    submission.write(folder)
    try:
        merge_job = _submit(f"--dependency=afterany:{job}", str(merge))
    except CheckRefusedError as error:
        raise CheckRefusedError(f"array job {job} was submitted, but not the merge behind it: {error}") from error
    Submission(job, merge_job, workers, left, submission.submitted).write(folder)
    _say(folder, plan, config, left, job, merge_job)
    return 0


def print_scripts(config: ExperimentConfig, plan: Plan, workers: int) -> None:
    """Print the scripts and the commands that would submit them."""
    folder = CampaignFolder.of(config)
    files = BatchFiles(folder, config, workers)
    run, merge = (shlex.quote(str(folder.file(name))) for name in ("run.sbatch", "merge.sbatch"))
    left = _shards_left(folder, plan, workers)
    print(f"\n--- {run}\n{files.run()}\n--- {merge}\n{files.merge()}")
    if left:
        print(f"sbatch --parsable --array={_array(config, left)} {run}")
        print(f"sbatch --parsable --dependency=afterany:JOB {merge}")
    print("nothing was written or submitted")


def _shards_left(folder: CampaignFolder, plan: Plan, workers: int) -> list[int]:
    finished = folder.finished_runs()
    numbers = shard_numbers(plan, workers).tolist()
    return sorted({number for run, number in zip(plan.runs, numbers, strict=True) if run.run_id not in finished})


def _array(config: ExperimentConfig, shards: list[int]) -> str:
    limit = config.slurm.array_limit
    return array_text(shards) + (f"%{limit}" if limit else "")


def _check_over(folder: CampaignFolder) -> None:
    """Refuse a second submission beside the first: runs would be done twice, and shards have one writer each."""
    before = Submission.read(folder)
    if before is not None:
        active = [job for job, state in task_states(before.job).items() if state in _WAITING_OR_RUNNING]
        if active:
            raise CheckRefusedError(
                f"{folder.path}: {len(active)} tasks of job {before.job} are waiting or running; let them end, or: "
                f"scancel {before.job}"
            )


def _submit(*arguments: str) -> str:
    answer = ask("sbatch", "--parsable", *arguments)
    if answer.returncode:
        raise CheckRefusedError(f"sbatch: {' '.join(answer.stderr.split()) or f'exit status {answer.returncode}'}")
    # JOB or JOB;CLUSTER
    return answer.stdout.strip().partition(";")[0]


def _say(
    folder: CampaignFolder, plan: Plan, config: ExperimentConfig, shards: list[int], job: str, merge_job: str
) -> None:
    print(f"array job {job}: {len(shards)} tasks ({_array(config, shards)}) for {len(plan.runs)} runs")
    print(f"merge job {merge_job}: when all of them have ended")
    print(f"  follow:  run_sweep.py status {folder.path}   or   squeue -j {job},{merge_job}")
    print(f"  logs:    {folder.file('logs')}/slurm-{job}_*.out")
    print(f"  cancel:  scancel {job}; the same command submits what is left")
