"""What one input costs before its first run, in forward passes.

    python -m benchmarks.opening                                # GPT-2-small shape, 1 x 128, the default detectors
    python -m benchmarks.opening --detectors lite --shape 4,128
    python -m benchmarks.opening --quick --json                 # a small model, seconds

A plain forward pass and the opening of an input alternate in one process; printed are the medians of the processor time
and the median of the ratios of the same rounds. ``opening`` is all that is done for an input when others of its shape
were opened before: the fault-free pass with survey, detectors and recording, and the baseline's side of effects.
``baseline`` is the pass without recording, with whole calls shown to the detectors; ``first`` is the same for the first
input of a shape, where a plain pass is compared with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from benchmarks.measuring import CLOCKS, alternate, machine_facts, medians, ratio_to
from benchmarks.workloads import DEFAULT_DETECTORS, MODELS, Workload, parse_shape
from experiments.engine.opened_batch import Opening
from experiments.machine.environment import set_determinism
from experiments.passes.baseline import compute_baseline


def variants(work: Workload, names: Sequence[str]) -> dict[str, Callable[[int], None]]:
    """Return what is measured, by name."""
    subject, batch = work.subject, work.batch
    detectors = work.pairs.detectors(work.config(names))
    seconds = work.baseline(names).forward_seconds

    def opening(_: int) -> None:
        recorder = Opening(subject, work.chain, detectors, by_groups=True)
        opened = recorder.opened(batch, compute_baseline(subject, batch, detectors, seconds=seconds, recorder=recorder))
        if isinstance(opened, str):
            raise RuntimeError(opened)

    def baseline(_: int) -> None:
        compute_baseline(subject, batch, detectors, seconds=seconds)

    def first(_: int) -> None:
        compute_baseline(subject, batch, detectors)

    def forward(_: int) -> None:
        subject.forward(batch)

    return {"forward": forward, "opening": opening, "baseline": baseline, "first": first}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What one input costs before its first run.")
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds: seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--detectors", default=",".join(DEFAULT_DETECTORS), help="comma list (default: %(default)s)")
    parser.add_argument("--shape", type=parse_shape, metavar="B,T", help="sequences, tokens (default: 1,128)")
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu", help="wall: for a machine that is quiet")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    chosen = _parser().parse_args(arguments)
    rounds = chosen.rounds or (3 if chosen.quick else 9)
    shape = chosen.shape or ((2, 48) if chosen.quick else (1, 128))
    set_determinism(chosen.threads)
    with Workload.of(chosen.model, chosen.dtype, shape, quick=chosen.quick) as work:
        seconds = alternate(variants(work, chosen.detectors.split(",")), rounds, chosen.clock)
    middle, ratios = medians(seconds), ratio_to(seconds, "forward")
    if chosen.json:
        facts = {"machine": machine_facts(), "model": chosen.model, "shape": shape, "dtype": chosen.dtype}
        print(json.dumps({**facts, "rounds": rounds, "seconds": middle, "forwards": ratios}))
        return
    print(f"{shape}  {chosen.model}, {chosen.dtype}, {chosen.detectors}, {rounds} rounds, {chosen.clock} time")
    for name in middle:
        print(f"  {name:10} {1e3 * middle[name]:9.1f} ms {ratios[name]:7.2f} forwards")


if __name__ == "__main__":
    main()
