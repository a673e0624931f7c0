"""Alternating measurements in one process, and the machine they were made on.

    rounds = alternate({"plain": plain, "watched": watched}, rounds=9)       # seconds by variant, round by round
    ratio_to(rounds, "plain")["watched"]                                     # median of the ratios of the same rounds

What slows the machine down for a while slows all variants of a round down, so ratios are taken within rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from experiments.engine.proof import ENVIRONMENT
from experiments.machine.environment import environment_facts

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` counts the time of this process alone: the better one where others use the machine, and no device."""

WARM_UP = -1
"""The number of the round that is not measured."""

Seconds = dict[str, list[float]]


def alternate(variants: Mapping[str, Callable[[int], None]], rounds: int, clock: str = "wall") -> Seconds:
    """Return the seconds of each variant in each round; the order rotates from round to round.

    Args:
        variants: called with the number of the round, first ``WARM_UP``.
        rounds: how many are measured.
        clock: a name in ``CLOCKS``.
    """
    names, now = list(variants), CLOCKS[clock]
    seconds: Seconds = {name: [] for name in names}
    for variant in variants.values():
        variant(WARM_UP)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = now()
            variants[name](number)
            seconds[name].append(now() - start)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    """Return the median over the rounds of each variant."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio_to(seconds: Seconds, reference: str) -> dict[str, float]:
    """Return for each variant the median of its seconds divided by those of the reference in the same round."""
    return {
        name: statistics.median(own / other for own, other in zip(values, seconds[reference], strict=True))
        for name, values in seconds.items()
    }


def machine_facts() -> dict[str, Any]:
    """Return the processor, threads, torch's version and the instruction set and variables that choose its kernels."""
    facts = environment_facts([])
    return {
        "cpu": facts["processor"],
        "threads": facts["threads"],
        "torch": torch.__version__,
        "capability": facts["cpu_capability"],
        "environment": {name: value for name, value in facts["environment"].items() if name in ENVIRONMENT},
    }
