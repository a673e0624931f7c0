"""``run_sweep.py plan-size``: how many runs a campaign needs, and how many different faults there are.

Public name: ``plan_size``.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.commands.options import take_value, whole_number
from experiments.config import ExperimentConfig, load_config
from experiments.contexts import Contexts
from experiments.errors import UsageError
from experiments.paired_run import PairedRunner
from experiments.plan import make_plan
from experiments.provenance import set_determinism
from experiments.sample_size import sample_size
from fault_injection import Site
from fault_injection.bits import float_format
from monitoring import TraceWriter


def plan_size(arguments: Sequence[str]) -> int:
    """Print the sample size for ``--margin`` and ``--confidence``, for a population given or counted on the model."""
    options = list(arguments)
    margin, confidence = _number(options, "--margin"), _number(options, "--confidence")
    rate, population = _number(options, "--rate", 0.5), take_value(options, "--population")
    config = load_config(options)
    if population is None:
        total = _print_population(config)
    elif not whole_number(population):
        raise UsageError(f"--population: got {population}, allowed a whole number of 1 or more")
    else:
        total = int(population)
    try:
        needed, unlimited = sample_size(margin, confidence, total, rate), sample_size(margin, confidence, None, rate)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    print(f"{needed} runs for a margin of {margin:g} at {confidence:g} confidence, expected rate {rate:g}")
    print(f"  of a population of {total} faults (sites x bits); {unlimited} if it were unlimited")
    print("  (Leveugle et al., DATE 2009; per cell of the grid, if each cell is to have this margin)")
    return 0


def _number(options: list[str], name: str, default: float | None = None) -> float:
    text = take_value(options, name)
    if text is None and default is not None:
        return default
    try:
        return float(text or "")
    except ValueError:
        raise UsageError(f"{name}: got {text}, allowed a number between 0 and 1") from None


def _print_population(config: ExperimentConfig) -> int:
    """Count the single-bit faults of the campaign's grid: elements that may be hit, times bits, over all batches."""
    set_determinism(config.run.threads)
    plan = make_plan(config)
    total = 0
    with Contexts(TraceWriter(None)) as contexts:
        pairs = contexts.open(plan.config_of(plan.runs[0]))
        for location in config.sweep.get("fault.location", [config.fault.location]):
            count = _faults_at(pairs, config.with_field("fault.location", location))
            print(f"{location:8} {count:15,} faults per layer set, input and model")
            total += count
    return total


def _faults_at(pairs: PairedRunner, config: ExperimentConfig) -> int:
    count = 0
    for batch_index in range(len(pairs.batches)):
        sites = pairs.baseline(batch_index, config).sites
        for layer in pairs.check_layers(config):
            site = sites[layer, config.fault.location]
            count += _elements(site, include_masked=config.fault.include_masked) * float_format(site.dtype).width
    return count


def _elements(site: Site, *, include_masked: bool) -> int:
    batch, head, row, col = site.extent
    if site.visible is None or include_masked:
        return batch * head * row * col
    return int(site.visible.expand(site.extent).sum())
