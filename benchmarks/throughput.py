"""Runs per second of every way to execute runs, against the pair of two whole forward passes.

    python -m benchmarks.throughput                                       # GPT-2-small shape, four input shapes
    python -m benchmarks.throughput --shape 1,128 --dtype bfloat16 --json
    python -m benchmarks.throughput --quick                               # a small model, seconds

All ways alternate in one process with one thread. A figure is everything that a run needs: its passes, the loss, and
(but for ``naive_pair``) the comparison with the fault-free output; not the drawing of faults and the writing of files.
``bitwise_equal`` compares a sample of the runs with the plain injected pass: outcome, effect, loss, local change and
verdicts of the detectors. With ``--json`` each shape is one JSON object on a line of its own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.floor import least_work, product_rate
from benchmarks.measuring import CLOCKS, WARM_UP, alternate, machine_facts, medians, ratio_to
from benchmarks.plain_check import PlainCheck
from benchmarks.variants import NAIVE, Counts, Found, Variant, make_variants
from benchmarks.workloads import DEFAULT_DETECTORS, MODELS, Shape, Workload, parse_shape
from experiments.engine.opened_batch import OpenedBatch
from experiments.engine.proof import prove
from experiments.machine.environment import set_determinism
from fault_injection import Fault

SHAPES = ((1, 64), (1, 128), (1, 512), (4, 128))
SUITES = {"none": (), "lite": ("lite",), "default": DEFAULT_DETECTORS}


class Collected:
    """Runs the variants on their shares of the faults and keeps what they found.

    The shares are strides through faults sorted by layer and row, so that few runs still have the mean work; the
    first round of a variant with fewer runs is contained in that of one with more.
    """

    def __init__(self, variants: Mapping[str, Variant], faults: Sequence[Fault]) -> None:
        self.found: dict[str, dict[int, Found]] = {name: {} for name in variants}
        self._variants, self._faults = variants, faults

    def round(self, name: str) -> Callable[[int], None]:
        """Return what executes a round of a variant, given the number of the round."""
        variant = self._variants[name]
        stride = len(self._faults) // variant.count

        def execute(number: int) -> None:
            first = number * 5 % stride
            chosen = range(first, first + stride * variant.count, stride)
            if number == WARM_UP:
                chosen = chosen[:: max(1, variant.count // 4)]
            found = variant.execute([self._faults[i] for i in chosen])
            self.found[name] |= zip(chosen, found, strict=True)

        return execute


def measure(work: Workload, counts: Counts, rounds: int, clock: str = "wall") -> dict[str, Any]:
    """Return what was measured on one input: ``shared``, ``variants`` and ``floor``.

    Args:
        work: model and input.
        counts: runs of a round; each must divide ``counts.site``.
        rounds: measured rounds.
        clock: a name in ``benchmarks.measuring.CLOCKS``.
    """
    opened, shared = _opened(work, CLOCKS[clock])
    faults = work.faults(counts.site)
    variants = make_variants(work, opened, counts)
    collected = Collected(variants, faults)
    seconds = alternate({name: collected.round(name) for name in variants}, rounds, clock)
    # Per run from here on, so that variants with different counts have ratios.
    each = {name: [value / variants[name].count for value in values] for name, values in seconds.items()}
    middle, ratios = medians(each), ratio_to(each, NAIVE)
    check, step = PlainCheck(work), counts.site // counts.single
    table: dict[str, Any] = {}
    for name in variants:
        sample = [i for i in range(0, counts.site, step) if i in collected.found[name]]
        differing = [check.differing(faults[i], collected.found[name][i]) for i in sample]
        table[name] = {
            "seconds_per_run": middle[name],
            "runs_per_second": 1.0 / middle[name],
            "speedup_over_naive_pair": 1.0 / ratios[name],
            "runs_a_round": variants[name].count,
            "bitwise_equal": differing.count(None) == len(sample),
            "runs_compared": len(sample),
        }
    saved = middle[NAIVE] - middle["everything_default"]
    spent = sum(shared["default"].values())
    shared["paid_back_after_runs"] = math.ceil(spent / saved) if saved > 0 else None
    everything = collected.found["everything"]
    done = [everything[i] for i in sorted(everything)]
    masked = [found.effect is not None and found.effect.outcome == "masked" for found in done]
    floor = _floor(work, opened["none"], [faults[i] for i in sorted(everything)], masked, middle)
    return {"shared": shared, "variants": table, "floor": floor}


def _opened(work: Workload, now: Callable[[], float]) -> tuple[dict[str, OpenedBatch], dict[str, Any]]:
    """Return the recorded input for each set of detectors, and the seconds that all runs of the input share."""
    work.subject.forward(work.batch)
    opened, shared = {}, {}
    for name, detectors in SUITES.items():
        start = now()
        work.baseline(detectors)
        known = now()
        opened[name] = work.opened(detectors)
        recorded = now()
        shared[name] = {"baseline_seconds": known - start, "recording_seconds": recorded - known}
    start = now()
    proof = prove(work.pairs.context, work.config(DEFAULT_DETECTORS))
    shared["default"]["proof_seconds"] = now() - start
    if proof.rows is not None or proof.head is not None:
        raise SystemExit(f"benchmarks.throughput: not exact here: {proof.rows or proof.head}")
    return opened, shared


def _floor(
    work: Workload, opened: OpenedBatch, faults: Sequence[Fault], masked: Sequence[bool], seconds: Mapping[str, float]
) -> dict[str, float]:
    least = least_work(work, opened.recording, faults, masked)
    rate = product_rate(work.subject.dtype)
    return {
        "pair_flops": least.pair,
        "run_flops": least.run,
        "site_flops": least.site,
        "behind_flops": least.behind,
        "head_flops": least.head,
        "masked_share": sum(masked) / len(masked),
        "speedup_at_equal_rate": least.pair / least.run,
        "naive_flops_per_second": least.pair / seconds[NAIVE],
        "run_flops_per_second": least.run / seconds["everything"],
        "product_flops_per_second": rate,
    }


def print_table(measured: Mapping[str, Any]) -> None:
    """Print what was measured on one input as text."""
    rows, length = measured["shape"]
    print(f"\n({rows}, {length})  {measured['model']}, {measured['dtype']}, {measured['rounds']} rounds")
    for name, facts in measured["variants"].items():
        equal = f"bitwise equal in {facts['runs_compared']}" if facts["bitwise_equal"] else "NOT bitwise equal"
        print(
            f"  {name:24} {1e3 * facts['seconds_per_run']:10.3f} ms a run {facts['speedup_over_naive_pair']:9.2f} x"
            f"   {equal}"
        )
    floor, shared = measured["floor"], measured["shared"]
    print(
        f"  floor: {floor['pair_flops'] / 1e9:.1f} GFLOP a pair, {floor['run_flops'] / 1e9:.2f} a run:"
        f" {floor['speedup_at_equal_rate']:.1f} x at an equal rate; {100 * floor['masked_share']:.0f} % masked;"
        f" {floor['naive_flops_per_second'] / 1e9:.0f} GFLOP/s (pair), {floor['run_flops_per_second'] / 1e9:.0f} (run),"
        f" {floor['product_flops_per_second'] / 1e9:.0f} (one large product)"
    )
    for name in SUITES:
        parts = ", ".join(f"{key.removesuffix('_seconds')} {value:.2f} s" for key, value in shared[name].items())
        print(f"  once for all runs of the input, detectors {name}: {parts}")
    print(f"  with the default detectors that is paid back after {shared['paid_back_after_runs']} runs")


def _runs_together(length: int) -> int:
    """Return about as many runs as campaigns execute together, a power of two."""
    return int(max(32, 2 ** math.floor(math.log2((1 << 14) / length))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Runs per second of every way to execute runs.")
    parser.add_argument("--quick", action="store_true", help="a small model, few runs: seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object a shape, each on a line")
    parser.add_argument("--shape", type=parse_shape, nargs="+", metavar="B,T", help="sequences, tokens (default: four)")
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--runs", type=int, help="runs of a round that share passes, a power of two (default: 16,384 tokens)"
    )
    parser.add_argument("--rounds", type=int, help="measured rounds (default: 5)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a machine that others use")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    chosen = _parser().parse_args(arguments)
    rounds = chosen.rounds or (2 if chosen.quick else 5)
    if chosen.runs is not None and (chosen.runs < 16 or chosen.runs & (chosen.runs - 1)):
        raise SystemExit(f"--runs: got {chosen.runs}, allowed powers of two from 16 on")
    shapes: Sequence[Shape] = chosen.shape or (((2, 48),) if chosen.quick else SHAPES)
    set_determinism(1)
    for shape in shapes:
        with Workload.of(chosen.model, chosen.dtype, shape, quick=chosen.quick) as work:
            facts = {"machine": machine_facts(), "model": chosen.model, "shape": shape, "dtype": chosen.dtype}
            counts = Counts.of(chosen.runs or (16 if chosen.quick else _runs_together(shape[1])))
            measured = {**facts, "rounds": rounds, "clock": chosen.clock, **measure(work, counts, rounds, chosen.clock)}
        if chosen.json:
            print(json.dumps(measured), flush=True)
        else:
            print_table(measured)


if __name__ == "__main__":
    main()
