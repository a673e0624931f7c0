"""``--launcher slurm --workers N``: submit a campaign as an array job of workers, followed by a merge job.

launch(Order(config, options, workers=16), stop)       # submits, and returns at once
show(Order(config, options, workers=16))               # prints the two scripts and submits nothing
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
import time

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.states import shards_left
from experiments.campaign.submission import Submission, check_over
from experiments.config import ExperimentConfig
from experiments.errors import CheckRefusedError, MissingResourceError
from experiments.inputs.plan_check import check_plan
from experiments.launchers.registry import Order
from experiments.launchers.slurm_scripts import BatchFiles, array_text
from experiments.machine.slurm_task import ask
from experiments.machine.stop_request import StopRequest
from experiments.plan.plan import Plan, make_plan
from experiments.tables.csv_file import write_text

SUBMIT_SECONDS = 120.0
"""How long ``sbatch`` may take: if the controller is busy, it retries for a while."""


def launch(order: Order, stop: StopRequest) -> int:
    """Write the plan and the scripts, submit them, print how to follow the jobs, and return at once.

    Only shards that still have runs to do become tasks. The merge runs when all tasks have ended, with or without
    success. With ``overwrite``, the earlier campaign is removed when Slurm accepts the array, and restored if Slurm
    refuses it.

    Raises:
        MissingResourceError: ``sbatch`` is not installed, or does not answer.
        CheckRefusedError: Slurm refuses (its own words follow), or an earlier submission of the campaign is not over.
        UsageError: the folder holds another campaign, cannot be written, or has a path that a script cannot name.
    """
    config, plan = order.config, _checked_plan(order.config)
    if shutil.which("sbatch") is None:
        raise MissingResourceError("sbatch: not found; --launcher slurm needs Slurm's programs on this machine")
    folder = CampaignFolder.of(config)
    files = BatchFiles(folder, config, order.workers, order.grace, order.quiet)
    folder.check_writable()
    check_over(folder)
    with folder.replaced() if order.overwrite else contextlib.nullcontext():
        folder.check_same(config)
        left = shards_left(folder, plan, order.workers)
        if not left:
            # With a stopping rule not all planned runs are done.
            number = "" if config.stop.margin is not None else f" {len(plan.runs)}"
            print(f"all{number} runs are done; then: run_sweep.py merge {folder.path}")
            return 0
        folder.begin(config, plan)
        write_text(folder.file("run.sbatch"), files.run())
        write_text(folder.file("merge.sbatch"), files.merge())
        folder.file("logs").mkdir(exist_ok=True)
        submission = _submit_array(folder, config, order.workers, left)
    merge_job = _submit_merge(folder, submission)
    _say(folder, plan, config, left, submission.job, merge_job)
    return 0


def _checked_plan(config: ExperimentConfig) -> Plan:
    plan = make_plan(config)
    check_plan(plan)
    return plan


def _submit_array(folder: CampaignFolder, config: ExperimentConfig, workers: int, left: list[int]) -> Submission:
    """Submit the workers; write and return the submission."""
    try:
        job = _submit(f"--array={_array(config, left)}", str(folder.file("run.sbatch")))
    except MissingResourceError as error:
        raise MissingResourceError(
            f"{error}; whether Slurm took the array is not known: look with squeue --name={config.name}, scancel what "
            "is there, and submit again"
        ) from error
    submission = Submission(job, None, workers, left, time.time())
    submission.write(folder)
    return submission


def _submit_merge(folder: CampaignFolder, submission: Submission) -> str:
    job = submission.job
    try:
        merge_job = _submit(f"--dependency=afterany:{job}", str(folder.file("merge.sbatch")))
    except (CheckRefusedError, MissingResourceError) as error:
        raise type(error)(
            f"array job {job} was submitted, but not the merge behind it ({error}); when it is over: run_sweep.py "
            f"merge {folder.path}"
        ) from error
    dataclasses.replace(submission, merge_job=merge_job).write(folder)
    return merge_job


def show(order: Order) -> None:
    """Print the scripts and the commands that would submit them."""
    config, plan = order.config, make_plan(order.config)
    folder = CampaignFolder.of(config)
    files = BatchFiles(folder, config, order.workers, order.grace, order.quiet)
    run, merge = (shlex.quote(str(folder.file(name))) for name in ("run.sbatch", "merge.sbatch"))
    left = shards_left(folder, plan, order.workers)
    print(f"\n--- {run}\n{files.run()}\n--- {merge}\n{files.merge()}")
    if left:
        print(f"sbatch --parsable --array={_array(config, left)} {run}")
        print(f"sbatch --parsable --dependency=afterany:JOB {merge}")
    print("nothing was written or submitted")


def _array(config: ExperimentConfig, shards: list[int]) -> str:
    limit = config.slurm.array_limit
    return array_text(shards) + (f"%{limit}" if limit else "")


def _submit(*arguments: str) -> str:
    answer = ask("sbatch", "--parsable", *arguments, seconds=SUBMIT_SECONDS)
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
