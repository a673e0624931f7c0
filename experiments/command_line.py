"""The command line: its commands, and the exit status of each refusal.

    main(["--sweep.fault.bit", "0:32"])      # returns the exit status

0: all runs done; 1: a run failed or a check refused; 2: bad usage; 3: a needed resource is missing; 130: interrupted.

The imports here are light (no torch), so ``--help`` answers at once and signals are handled from the beginning. A
command's module is imported when it is called.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from experiments import __version__
from experiments.commands.listing import LISTS
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError, nearest
from experiments.launchers.leaving import leave
from experiments.launchers.registry import launcher_help
from experiments.machine.stop_request import StopRequest
from experiments.registry import loaded

NAME = "attention-fault-injection"

COMMANDS = {
    "replay": "experiments.commands.replay:replay",
    "status": "experiments.commands.status:status",
    "merge": "experiments.commands.merge_and_trace:merge",
    "export": "experiments.commands.export:export",
    "report": "experiments.commands.report:report",
    "trace": "experiments.commands.merge_and_trace:trace",
    "plan-size": "experiments.commands.plan_size:plan_size",
}
"""The function of each command; it gets the arguments after the command's name."""

_HELP = """\
usage: run_sweep.py [--config FILE] [--<field> VALUE ...] [--sweep.<field> VALUES ...] [options]
       run_sweep.py replay results/NAME RUN_ID     one run again; the same numbers, or exit 1
       run_sweep.py status results/NAME            done, running, failed and missing runs; rate and expected end
       run_sweep.py merge results/NAME             make the tables from the shards
       run_sweep.py export results/NAME [--table T] [--output FILE]     a merged table as Parquet
       run_sweep.py report results/NAME            one HTML page, report.html, and summary.csv
       run_sweep.py trace results/NAME             where the time went, from the trace
       run_sweep.py plan-size --margin E --confidence C [--population N | campaign options]

Without options: the embedded default campaign (experiments/configs/default.yaml).

options:
  --config FILE           a campaign in YAML; see experiments/configs/
  --<field> VALUE         any field by its dotted name, e.g. --fault.location scores --data.num_samples 128
  --sweep.<field> VALUES  an axis: a,b,c or start:stop[:step] or a YAML list
  --dry-run               print the plan and write nothing
  --list WHAT             {lists}
  --shard I/N             this part of the plan only (also read from a Slurm array task's variables)
{launchers}
  --grace SECONDS         after SIGUSR1, how long the pass in hand may take (default 90)
  --quiet                 no progress bar
  --overwrite             forget an earlier campaign of this name
  --version               name and version of this program
  --help                  this text

The same command continues a campaign that was stopped. Exit status: 0 all runs done, 1 some run failed or a
check refused, 2 bad usage, 3 a needed resource is missing.
"""


def help_text() -> str:
    """Return what ``--help`` prints."""
    return _HELP.format(lists=", ".join(LISTS), launchers=launcher_help())


def main(arguments: Sequence[str]) -> int:
    """Run the command with these arguments and return its exit status; refusals are one line on standard error."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return 0
    if "--version" in arguments:
        print(f"{NAME} {__version__}")
        return 0
    return _guarded(arguments)


def _guarded(arguments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return _command(arguments)
    except (UsageError, MissingResourceError, CheckRefusedError) as error:
        print(f"run_sweep.py: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # The reader went away (head, less), so nobody would see a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A full disk, or a folder that disappeared: one line for the user, the traceback at debug level.
        logging.getLogger(__name__).debug("traceback", exc_info=error)
        print(f"run_sweep.py: {error}", file=sys.stderr)
        return MissingResourceError.exit_status
    except KeyboardInterrupt:
        print("run_sweep.py: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _command(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments and not arguments[0].startswith("-") else "sweep"
    _quiet_transformers()
    if name != "sweep":
        return _find(name)(arguments[1:])
    # Before anything heavy is imported: a task of a cluster can be preempted in its first second.
    with StopRequest() as stop:
        try:
            from experiments.commands.sweep import sweep
        except KeyboardInterrupt:
            if stop.requested():
                leave(stop)
            raise
        return sweep(arguments, stop)


def _find(name: str) -> Callable[[Sequence[str]], int]:
    if name not in COMMANDS:
        allowed = sorted(COMMANDS)
        raise UsageError(f"{name}: no such command, allowed {', '.join(allowed)}{nearest(name, allowed)}")
    command: Callable[[Sequence[str]], int] = loaded(COMMANDS[name])
    return command


def _quiet_transformers() -> None:
    """Turn the progress bars and reports of libraries off: ours is the only bar, and a refusal is one line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        # It has read the variables before, in a program that calls main.
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
