"""How much time the detector suites take: on a whole forward pass, and on a site step of the fast engine.

    python -m benchmarks.detectors                              # GPT-2-small shape, random weights
    python -m benchmarks.detectors --suites lite --shape 4,128 --rounds 11
    python -m benchmarks.detectors --quick --json               # a small model, seconds

The plain eager forward pass and the same pass with each suite inside alternate in one process; printed are the median
of every variant and the median of the ratios of the same rounds. ``watched`` is the cost of the instrumentation and of
keeping the tensors, without any detector. A site step evaluates 64 faults of one layer, each in its own head, and lets
each suite judge them; its figures are those of one fault. With ``--json`` each shape is one JSON object on a line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.measuring import CLOCKS, alternate, machine_facts, medians, ratio_to
from benchmarks.workloads import DEFAULT_DETECTORS, MODELS, Shape, Workload, parse_shape
from experiments.machine.environment import set_determinism
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.watcher import Watcher
from fault_injection import suspended

SHAPES = ((1, 64), (1, 512), (4, 128))
SUITES = ("lite", "full", "full-g4", "default")
SITES = 64
"""Faults of one site step."""

Variants = dict[str, Callable[[int], None]]


def forward_overhead(work: Workload, suites: Sequence[str], rounds: int, clock: str = "wall") -> dict[str, Any]:
    """Return seconds and overhead (0.1: a tenth more than the plain pass) of one forward pass with each suite.

    Raises:
        RuntimeError: a detector fires on the fault-free pass.
    """
    variants: Variants = {"plain": lambda _: _plain(work), "watched": _watched(work, ())}
    variants |= {suite: _watched(work, _members(suite)) for suite in suites}
    seconds = alternate(variants, rounds, clock)
    middle, ratios = medians(seconds), ratio_to(seconds, "plain")
    return {name: {"seconds": middle[name], "overhead": ratios[name] - 1.0} for name in variants}


def site_steps(work: Workload, suites: Sequence[str], rounds: int, clock: str = "wall") -> dict[str, Any]:
    """Return seconds of one fault in a site step of ``SITES`` faults, and how many times as long as without detectors.

    The faults lie in the middle layer, everywhere in it.
    """
    faults = work.faults(SITES, layer=len(work.subject.cores) // 2)

    def step(detectors: Sequence[str]) -> Callable[[int], None]:
        engine = work.opened(detectors).engine(None, None)
        sites = [site for fault in faults if (site := engine.site_of(fault)) is not None]
        return lambda _: _discard(engine.run([(site, False) for site in sites], 1e-3))

    variants: Variants = {"none": step(()), **{suite: step(_members(suite)) for suite in suites}}
    seconds = alternate(variants, rounds, clock)
    middle, ratios = medians(seconds), ratio_to(seconds, "none")
    return {name: {"seconds_per_run": middle[name] / SITES, "times_none": ratios[name]} for name in variants}


def _members(suite: str) -> Sequence[str]:
    return DEFAULT_DETECTORS if suite == "default" else (suite,)


def _plain(work: Workload) -> None:
    with suspended(work.subject.model):
        work.subject.forward(work.batch)


def _watched(work: Workload, names: Sequence[str]) -> Callable[[int], None]:
    detectors = work.pairs.detectors(work.config(names))
    situation = work.baseline(names).situation

    def run(_: int) -> None:
        with recorded_origins(work.subject.model, detectors) as origins:
            watcher = Watcher(detectors, situation, origins=origins)
            work.subject.forward(work.batch, watcher)
        fired = [key for key, verdict in watcher.verdicts.items() if verdict.fired]
        if fired:
            raise RuntimeError(f"false positives: {fired}")

    return run


def _discard(_value: object) -> None:
    pass


def print_table(measured: Mapping[str, Any]) -> None:
    """Print what was measured on one input as text."""
    rows, length = measured["shape"]
    print(f"\n({rows}, {length})  {measured['model']}, {measured['dtype']}, {measured['rounds']} rounds")
    print("  forward pass            median      added      site step           a fault   times none")
    forward, site = measured["forward"], measured["site_step"]
    for name, facts in forward.items():
        line = f"  {name:16} {1e3 * facts['seconds']:11.1f} ms {100 * facts['overhead']:+8.1f} %"
        step = site.get("none" if name == "watched" else name)
        if step is not None:
            line += f"      {1e6 * step['seconds_per_run']:17.0f} us {step['times_none']:9.1f}"
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time that the detector suites take.")
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds: seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object a shape, each on a line")
    parser.add_argument("--suites", default=",".join(SUITES), help="comma list (default: %(default)s)")
    parser.add_argument(
        "--shape", type=parse_shape, nargs="+", metavar="B,T", help="sequences, tokens (default: three)"
    )
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a machine that others use")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    chosen = _parser().parse_args(arguments)
    rounds = chosen.rounds or (3 if chosen.quick else 9)
    suites = chosen.suites.split(",")
    shapes: Sequence[Shape] = chosen.shape or (((2, 48),) if chosen.quick else SHAPES)
    set_determinism(chosen.threads)
    for shape in shapes:
        with Workload.of(chosen.model, chosen.dtype, shape, quick=chosen.quick) as work:
            facts = {"machine": machine_facts(), "model": chosen.model, "shape": shape, "dtype": chosen.dtype}
            forward = forward_overhead(work, suites, rounds, chosen.clock)
            site = site_steps(work, suites, rounds, chosen.clock)
            measured = {**facts, "rounds": rounds, "clock": chosen.clock, "forward": forward, "site_step": site}
        if chosen.json:
            print(json.dumps(measured), flush=True)
        else:
            print_table(measured)


if __name__ == "__main__":
    main()
