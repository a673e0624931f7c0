"""``run_sweep.py replay results/NAME RUN_ID [--engine plain]``: execute a run again and compare its numbers.

The comparison covers the run's row and its rows of ``propagation.csv``.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Container, Iterable, Iterator, Sequence

from experiments.campaign.folder import CampaignFolder
from experiments.commands.options import take_value
from experiments.config import ExperimentConfig
from experiments.config.building import replaced
from experiments.config.checks import check_choice
from experiments.config.sections import ENGINES
from experiments.engine.contexts import Contexts, context_key
from experiments.errors import UsageError
from experiments.machine.environment import set_determinism
from experiments.plan.plan import Plan, PlannedRun, make_plan
from experiments.runs.record import RunRecord
from experiments.tables.row_lines import cells_of, first_cell, row_lines
from experiments.tables.schema import UNREPEATABLE, ExperimentResult, PropagationRow, cells, columns
from monitoring import TraceWriter


def replay(arguments: Sequence[str]) -> int:
    """Execute runs again and compare all numbers except the timings; return 1 if any number differs.

    Args:
        arguments: the campaign's folder and one or more run ids; ``--engine plain`` (or ``fast``, ``auto``) replaces
            the campaign's ``run.engine``.
    """
    arguments = list(arguments)
    engine = take_value(arguments, "--engine")
    if engine is not None:
        check_choice("--engine", engine, ENGINES)
    if len(arguments) < 2:
        raise UsageError("replay: needs a campaign folder and a run id, e.g. replay results/default 0123456789abcdef")
    folder = CampaignFolder.existing(arguments[0])
    config = folder.config()
    plan = make_plan(config)
    blocks = _blocks(folder, arguments[1:])
    runs = [plan.by_id(run_id) for run_id in arguments[1:]]
    recorded = _recorded(folder, {run.run_id for run in runs})
    for run in runs:
        if run.run_id not in recorded:
            raise UsageError(f"replay: run {run.run_id} has no row yet, there is nothing to compare with")
    set_determinism(config.run.threads)
    same = True
    with Contexts(TraceWriter(None)) as contexts:
        for again in _executed(contexts, plan, runs, engine):
            run_id = again.result.run_id
            differing = _differing_blocks(blocks[run_id], [cells(row) for row in again.propagation])
            same &= _print_comparison(recorded[run_id], cells(again.result), differing)
    return 0 if same else 1


def _executed(contexts: Contexts, plan: Plan, runs: Iterable[PlannedRun], engine: str | None) -> Iterator[RunRecord]:
    change = {} if engine is None else {"run.engine": engine}
    configured = [(run, ExperimentConfig.of(replaced(plan.config_of(run), change))) for run in runs]
    configured.sort(key=lambda pair: context_key(pair[1]))
    for _, group in itertools.groupby(configured, key=lambda pair: context_key(pair[1])):
        pairs = list(group)
        # The checks use the batch of the first run: its fault-free pass is made anyway.
        first, of_first = pairs[0]
        for _, record in contexts.open(of_first, first).run_many(pairs):
            if isinstance(record, Exception):
                raise record
            yield record


def _recorded(folder: CampaignFolder, run_ids: Container[str]) -> dict[str, list[str]]:
    lines = (line for path in folder.shard_files() for _, line in row_lines(path, columns(ExperimentResult)))
    return {first_cell(line): cells_of(line) for line in lines if first_cell(line) in run_ids}


def _blocks(folder: CampaignFolder, run_ids: Collection[str]) -> dict[str, list[list[str]]]:
    """Return the rows of ``propagation.csv`` by run; if two workers did a run, the rows of the last."""
    found: dict[str, list[list[str]]] = {run_id: [] for run_id in run_ids}
    for path in folder.shard_files(".propagation"):
        lines = (line for _, line in row_lines(path, columns(PropagationRow)) if first_cell(line) in found)
        of_worker = sorted(map(cells_of, lines))
        found |= {run_id: list(rows) for run_id, rows in itertools.groupby(of_worker, key=lambda row: row[0])}
    return found


def _differing_blocks(recorded: list[list[str]], again: list[list[str]]) -> list[tuple[str, str, str]]:
    before, now = ({row[1]: row[2] for row in rows} for rows in (recorded, again))
    names = sorted({*before, *now}, key=int)
    pairs = [(f"relative_change behind block {name}", before.get(name, ""), now.get(name, "")) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _print_comparison(recorded: list[str], again: list[str], blocks: list[tuple[str, str, str]]) -> bool:
    rows = list(zip(columns(ExperimentResult), recorded, again, strict=True))
    differing = [(name, old, new) for name, old, new in rows if old != new and name not in UNREPEATABLE] + blocks
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
