"""Which detectors see which faults: single-bit flips, uniform over sites and bits, in one model.

    python -m benchmarks.detection_rates --model reference --faults 20000           # per location
    python -m benchmarks.detection_rates --model reference-kv --dtype bfloat16 --detectors full-g4,epsilon,oracles

Faults are drawn uniformly over the elements of a location (of keys that a query sees) in all layers, and over the bits
of its dtype; the windows are those of the default campaign's source. Printed: detection rates per location and bit
field for every detector, the same among critical faults (nonfinite ones included), and every critical fault that the
suite missed. ``--output`` writes a row per fault.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import beta

from benchmarks.batched_faults import Trial, Trials
from bounds import Detector, get_detector
from bounds.suites import SUITES, expand
from experiments.config import load_config
from experiments.inputs.models import load_model
from experiments.inputs.windows import make_batches
from experiments.machine.environment import set_determinism
from experiments.passes.calibration import calibrate
from experiments.passes.subject import Subject
from experiments.tables.schema import HARMFUL
from fault_injection import LOCATIONS, FaultSpec, bit_field, draw_fault
from fault_injection.faults.spec import ElementIndex


def prepare(
    subject: Subject, batches: Sequence[dict[str, torch.Tensor]], detectors: Sequence[Detector]
) -> list[Trials]:
    """Return what runs faults on each batch, and print what the detectors said of the fault-free passes."""
    runners = [Trials(subject, batch, detectors) for batch in batches]
    false = [trials.false_positives for trials in runners if trials.false_positives]
    if false:
        raise RuntimeError(f"false positives on fault-free passes: {false[0]}")
    for detector in detectors:
        verdicts = [v for trials in runners for (name, _), v in trials.clean.items() if name == detector.name]
        rows, fired = sum(v.rows_checked for v in verdicts), sum(v.violations for v in verdicts)
        reason = next((f"  not applicable: {v.reason}" for v in verdicts if v.reason), "")
        if verdicts:
            print(f"fault-free: {detector.name:14}{fired:8,} violations in {rows:11,} rows{reason}")
    return runners


def collect(subject: Subject, runners: Sequence[Trials], faults: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each fault: at least ``faults`` per location, spread evenly over layers and batches."""
    random = np.random.default_rng(seed)
    layers = [core.index for core in subject.cores]
    passes = -(-faults // (len(layers) * runners[0].faults_per_pass))
    for location, layer, number in itertools.product(LOCATIONS, layers, range(passes)):
        trials = runners[number % len(runners)]
        site = trials.sites[layer, location]
        drawn = []
        for b in range(trials.faults_per_pass):
            drawn.append(draw_fault(FaultSpec(location, index=ElementIndex(batch=b)), site, random))
        for trial in trials.run(layer, drawn):
            yield _row(trial)


def _row(trial: Trial) -> dict[str, Any]:
    fault, record, effect = trial.fault, trial.record, trial.effect
    return {
        "location": fault.location,
        "layer": fault.layer,
        "index": fault.index,
        "bit": fault.bits[0],
        "bit_field": bit_field(record.dtype, fault.bits[0]),
        "value_before": record.value_before,
        "value_after": record.value_after,
        "outcome": effect.outcome,
        "loss_diff": effect.loss_diff,
        "top1_changed": effect.top1_changed,
        "relative_change": effect.relative_change,
        "fired": " ".join(sorted(trial.fired)),
    }


def lower_bound(seen: int, total: int, confidence: float = 0.95) -> float:
    """Return the one-sided Clopper-Pearson lower bound of a share."""
    return 0.0 if seen == 0 else float(beta.ppf(1 - confidence, seen, total - seen + 1))


def print_tables(rows: pd.DataFrame, names: Sequence[str], suites: dict[str, tuple[str, ...]]) -> None:
    """Print rates per detector and suite: all faults, critical ones, per location and per bit field."""
    fired = rows.fired.str.split(" ").map(set)
    seen = {name: fired.map(lambda found, name=name: name in found) for name in names}
    for suite, members in suites.items():
        seen[suite.upper()] = fired.map(lambda found, members=members: bool(found & set(members)))
    harmful = rows.outcome.isin(HARMFUL)
    print(
        f"{len(rows)} faults, {int(harmful.sum())} critical or nonfinite; outcomes {dict(rows.outcome.value_counts())}"
    )
    print(f"\n% of all faults | % of critical ones{'':12}" + "".join(f"{name:>15}" for name in ("all", *LOCATIONS)))
    for name, mask in seen.items():
        cells = []
        for part in [rows.index == rows.index, *(rows.location == location for location in LOCATIONS)]:
            among = f"{100 * mask[part & harmful].mean():.2f}" if (part & harmful).any() else "-"
            cells.append(f"{100 * mask[part].mean():.2f}|{among}")
        print(f"{name:44}" + "".join(f"{cell:>15}" for cell in cells))
    fields = ("sign", "exponent", "mantissa")
    print(f"\nby bit field{'':32}" + "".join(f"{field:>15}" for field in fields))
    for name, mask in seen.items():
        shares = [f"{100 * mask[rows.bit_field == field].mean():.2f}" for field in fields]
        print(f"{name:44}" + "".join(f"{share:>15}" for share in shares))
    for suite in suites:
        caught, total = int(seen[suite.upper()][harmful].sum()), int(harmful.sum())
        print(
            f"\n{suite}: {total - caught} of {total} critical faults escape; detected "
            f"{100 * caught / total:.3f} % (95 % lower bound {100 * lower_bound(caught, total):.3f} %)"
        )
        escaped = rows[harmful & ~seen[suite.upper()]]
        if suite.startswith("full") and len(escaped):
            print(escaped.drop(columns=["fired"]).to_string())
        unseen = rows[~seen[suite.upper()]]
        print(f"{suite}: largest |loss change| among all undetected faults {unseen.loss_diff.abs().max():.3g}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="Detection rates of single-bit flips.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--faults", type=int, default=1000, help="per location (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--windows", type=int, default=128, help="windows drawn from the source")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a pass, one of them without a fault")
    parser.add_argument("--detectors", default="full-g4,epsilon,oracles,competitors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="CSV file for a row per fault")
    chosen = parser.parse_args(arguments)
    names = expand(chosen.detectors.split(","))
    config = load_config(
        [f"--model.path={chosen.model}", f"--model.dtype={chosen.dtype}", f"--data.seq_len={chosen.seq_len}",
         f"--data.num_samples={2 * chosen.windows}", f"--data.batch_size={chosen.batch}"]
    )  # fmt: skip
    set_determinism(1)
    loaded = load_model(config.model)
    made = make_batches(config.data, loaded.tokenizer, config.seed, loaded.family, vocab_size=loaded.vocabulary)
    start = time.perf_counter()
    with Subject(loaded.model, loaded.family) as subject:
        batches = [subject.to_device(batch) for batch in made]
        detectors = [get_detector(name) for name in names]
        for detector in detectors:
            detector.prepare(subject.model)
        # The first half is for faults, the second for the detectors that need calibration.
        half = len(batches) // 2
        calibrate(detectors, subject, lambda: batches[half:])
        rows = []
        runners = prepare(subject, batches[:half], detectors)
        for row in collect(subject, runners, chosen.faults, chosen.seed):
            rows.append(row)
            if len(rows) % 5000 < 1:
                print(f"{len(rows)} faults, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    if chosen.output:
        table.to_csv(chosen.output, index=False)
    suites = {suite: expand([suite]) for suite in SUITES if suite != "fused"}
    present = {suite: members for suite, members in suites.items() if set(members) <= set(names)}
    print(f"{chosen.model}, {chosen.dtype}, windows of {chosen.seq_len} tokens, {time.perf_counter() - start:.0f} s")
    print_tables(table, names, present)


if __name__ == "__main__":
    main()
