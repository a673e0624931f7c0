"""``run_sweep.py plan-size``: how many runs a campaign needs, and how many different faults are possible.

A population that is given needs no model; one that is counted needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.commands.options import take_value, whole_number
from experiments.config import load_config
from experiments.errors import UsageError
from experiments.plan.sample_size import sample_size


def plan_size(arguments: Sequence[str]) -> int:
    """Print the sample size for ``--margin`` and ``--confidence``.

    ``--population`` gives the number of possible faults; without it they are counted on the model. ``--rate`` is the
    expected rate; without it the worst case, 0.5.
    """
    options = list(arguments)
    margin, confidence = _number(options, "--margin"), _number(options, "--confidence")
    rate, population = _number(options, "--rate", 0.5), take_value(options, "--population")
    # Numbers out of range are refused before a model is loaded.
    _needed(margin, confidence, None, rate)
    config = load_config(options)
    if population is None:
        # Imported here: counting needs the model.
        from experiments.commands.population import print_population

        total = print_population(config, lambda faults: _needed(margin, confidence, faults, rate))
    elif not whole_number(population):
        raise UsageError(f"--population: got {population}, allowed a whole number of 1 or more")
    else:
        total = int(population)
    needed, unlimited = _needed(margin, confidence, total, rate), _needed(margin, confidence, None, rate)
    print(f"{needed} runs for a margin of {margin:g} at {confidence:g} confidence, expected rate {rate:g}")
    print(f"  of a population of {total:,} faults; {unlimited} if it were unlimited")
    if rate != 0.5:
        worst = _needed(margin, confidence, total, 0.5)
        print(
            f"  {worst} if nothing were known of the rate (0.5): expecting {rate:g} saves a factor {worst / needed:.3g}"
        )
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


def _needed(margin: float, confidence: float, population: int | None, rate: float) -> int:
    try:
        return sample_size(margin, confidence, population, rate)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
