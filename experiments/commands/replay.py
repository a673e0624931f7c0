"""``run_sweep.py replay results/NAME RUN_ID [--engine plain]``: one run again, and whether it gives the same numbers.

Public name: ``replay``.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Sequence

from experiments.campaign_folder import CampaignFolder
from experiments.commands.options import take_value
from experiments.config import ExperimentConfig
from experiments.config_sections import ENGINES, check_choice
from experiments.contexts import Contexts, context_key
from experiments.errors import UsageError
from experiments.plan import Plan, PlannedRun, make_plan
from experiments.provenance import set_determinism
from experiments.result import UNREPEATABLE, ExperimentResult, cells, columns
from experiments.row_lines import cells_of, first_cell, row_lines
from experiments.sections import replaced
from monitoring import TraceWriter


def replay(arguments: Sequence[str]) -> int:
    """Execute runs again and compare all but the timings and the engine; exit status 1 if any number differs.

    Args:
        arguments: the campaign's folder and one or more run ids; ``--engine plain`` (or ``fast``, ``auto``) for another
            engine than the campaign's ``run.engine``.
    """
    arguments = list(arguments)
    engine = take_value(arguments, "--engine")
    if engine is not None:
        check_choice("--engine", engine, ENGINES)
    if len(arguments) < 2:
        raise UsageError("replay: needs a campaign folder and a run id, e.g. replay results/default 0123456789abcdef")
    folder = CampaignFolder.existing(arguments[0])
    plan = make_plan(folder.config())
    runs = [plan.by_id(run_id) for run_id in arguments[1:]]
    recorded = _recorded(folder, {run.run_id for run in runs})
    for run in runs:
        if run.run_id not in recorded:
            raise UsageError(f"replay: run {run.run_id} has no row yet, there is nothing to compare with")
    set_determinism(folder.config().run.threads)
    same = True
    with Contexts(TraceWriter(None)) as contexts:
        for again in _executed(contexts, plan, runs, engine):
            same &= _print_comparison(recorded[again.run_id], cells(again))
    return 0 if same else 1


def _executed(
    contexts: Contexts, plan: Plan, runs: Iterable[PlannedRun], engine: str | None
) -> Iterator[ExperimentResult]:
    change = {} if engine is None else {"run.engine": engine}
    configured = [(run, ExperimentConfig.of(replaced(plan.config_of(run), change))) for run in runs]
    configured.sort(key=lambda pair: context_key(pair[1]))
    for _, group in itertools.groupby(configured, key=lambda pair: context_key(pair[1])):
        pairs = list(group)
        for _, record in contexts.open(pairs[0][1]).run_many(pairs):
            if isinstance(record, Exception):
                raise record
            yield record.result


def _recorded(folder: CampaignFolder, run_ids: Container[str]) -> dict[str, list[str]]:
    lines = (line for path in folder.shard_files() for _, line in row_lines(path, columns(ExperimentResult)))
    return {first_cell(line): cells_of(line) for line in lines if first_cell(line) in run_ids}


def _print_comparison(recorded: list[str], again: list[str]) -> bool:
    rows = list(zip(columns(ExperimentResult), recorded, again, strict=True))
    differing = [(name, old, new) for name, old, new in rows if old != new and name not in UNREPEATABLE]
    if not differing:
        values = {name: new for name, _, new in rows}
        print(
            f"{values['run_id']}: the same numbers ({values['location']} bit {values['bits'] or '-'} layer "
            f"{values['layers']}: {values['outcome'] or 'not propagated'}, loss_diff {values['loss_diff'] or '-'})"
        )
        return True
    for name, old, new in differing:
        print(f"{recorded[0]}: {name} was {old or '(empty)'}, is {new or '(empty)'}")
    return False
