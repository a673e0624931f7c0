"""How much time the detector suites add to a forward pass.

    python -m benchmarks.detector_overhead                     # GPT-2-small shape, random weights
    python -m benchmarks.detector_overhead --suites lite --shapes 4x128 --rounds 11

For each shape (sequences x tokens) the plain eager forward pass and the same pass with each suite inside alternate in
one process; printed are the median of every variant and the median of the per-round ratios to the plain pass.
``watched`` is the cost of the instrumentation and of keeping the tensors, without any detector.

Public names: ``measure``, ``main``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bounds import get_detector
from bounds.suites import expand
from experiments.call_state import Situation
from experiments.origins import recorded_origins
from experiments.subject import Subject
from experiments.watcher import Watcher
from fault_injection import SiteSurvey

Variant = Callable[[], None]


def measure(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round; the order rotates from round to round."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for variant in variants.values():
        variant()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _variants(subject: Subject, batch: dict[str, Tensor], suites: Sequence[str]) -> dict[str, Variant]:
    survey = SiteSurvey(subject.dtype)
    subject.forward(batch, survey)
    situation = Situation.of(survey, subject.kv_equal)

    def watched(names: Sequence[str]) -> Variant:
        detectors = [get_detector(name) for name in names]
        for detector in detectors:
            detector.prepare(subject.model)

        def run() -> None:
            with recorded_origins(subject.model, detectors) as origins:
                watcher = Watcher(detectors, situation, origins=origins)
                subject.forward(batch, watcher)
            fired = [key for key, verdict in watcher.verdicts.items() if verdict.fired]
            if fired:
                raise RuntimeError(f"false positives: {fired}")

        return run

    plain: dict[str, Variant] = {"plain": lambda: _discard(subject.forward(batch)), "watched": watched([])}
    return plain | {suite: watched(expand([suite])) for suite in suites}


def _discard(_value: object) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Overhead of the detector suites on a forward pass.")
    parser.add_argument("--suites", default="lite,full,full-g4", help="comma list (default: %(default)s)")
    parser.add_argument("--shapes", default="1x64,1x512,4x128", help="sequences x tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=chosen.layers)).to(getattr(torch, chosen.dtype))
    suites = chosen.suites.split(",")
    print(
        f"GPT-2-small shape, {chosen.layers} layers, {chosen.dtype}, {chosen.threads} thread(s), {chosen.rounds} rounds"
    )
    with Subject(model, "causal") as subject:
        for shape in chosen.shapes.split(","):
            rows, length = map(int, shape.split("x"))
            batch = subject.to_device({"input_ids": torch.randint(0, 50257, (rows, length))})
            seconds = measure(_variants(subject, batch, suites), chosen.rounds)
            for name, times in seconds.items():
                ratios = [own / base for own, base in zip(times, seconds["plain"], strict=True)]
                print(
                    f"({rows}, {length})  {name:12} {1e3 * statistics.median(times):9.1f} ms"
                    f"  {100 * (statistics.median(ratios) - 1):+7.1f} %"
                )


if __name__ == "__main__":
    main()
