"""How long a report of very many runs takes, how much memory, and how large the page is.

    python benchmarks/report_scale.py --runs 1000000 --folder /tmp/report_scale

Makes a campaign's folder of synthetic rows (no model is computed; the numbers mean nothing), then runs the command in a
process of its own. Prints seconds, peak resident memory and sizes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
from pyarrow import csv

from bounds.suites import expand
from experiments.campaign.folder import CampaignFolder
from experiments.config import ExperimentConfig, dump_config
from experiments.tables.csv_file import write_rows, write_text
from experiments.tables.schema import OUTCOMES, CleanRow, ExperimentResult, FailureRow, cells, columns
from fault_injection import LOCATIONS

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HEADS, BATCHES, BITS = 12, 12, 256, 32
DETECTORS = ("full", "epsilon", "oracles")


def make_campaign(folder: CampaignFolder, count: int) -> int:
    """Write a folder of about so many runs; return how many."""
    repeats = -(-count // (len(LOCATIONS) * BITS))
    config = ExperimentConfig(
        name=folder.path.name, output_dir=str(folder.path.parent), num_runs=repeats,
        sweep={"fault.location": list(LOCATIONS), "fault.bit": list(range(BITS))},
    )  # fmt: skip
    total = repeats * len(LOCATIONS) * BITS
    rng = np.random.Generator(np.random.Philox(0))
    folder.shards.mkdir(parents=True, exist_ok=True)
    runs = _runs(rng, total, repeats)
    plan = runs[["run_id", "repeat"]].assign(**{"fault.location": runs["location"], "fault.bit": runs["bit"]})
    _write(folder.file("plan.csv"), plan)
    _write(folder.file("runs.csv"), runs)
    (folder.shards / "0001.csv").unlink(missing_ok=True)
    os.link(folder.file("runs.csv"), folder.shards / "0001.csv")
    clean = (
        CleanRow(
            baseline=f"{batch:032x}", detector=name, tolerance=0.0, layer=layer, module=f"h.{layer}.attn", proved=True,
            applicable=True, rows_checked=1536, violations=0, largest_ratio=0.5,
        )
        for batch in range(BATCHES) for layer in range(LAYERS) for name in expand(DETECTORS)
    )  # fmt: skip
    write_rows(folder.file("clean.csv"), columns(CleanRow), map(cells, clean))
    write_rows(folder.file("failures.csv"), columns(FailureRow), [])
    write_text(folder.config_file, dump_config(config))
    return total


def _write(path: Path, frame: pd.DataFrame) -> None:
    options = csv.WriteOptions(include_header=False, quoting_style="none")
    with path.open("wb") as stream:
        stream.write((",".join(frame.columns) + "\n").encode())
        csv.write_csv(pyarrow.Table.from_pandas(frame, preserve_index=False), stream, options)


def _runs(rng: np.random.Generator, total: int, repeats: int) -> pd.DataFrame:
    cell = np.arange(total) // repeats
    bit, location = cell % BITS, np.array(LOCATIONS)[cell // BITS]
    outcome = np.array(OUTCOMES)[rng.choice(4, total, p=[0.1, 0.85, 0.03, 0.02])]
    ids = [f"{number:016x}" for number in rng.integers(0, 2**63, total)]
    names = np.array(expand(("full", "epsilon")))
    fired = rng.random((64, len(names))) < 0.15
    texts = np.array([";".join(names[row]) for row in fired])[rng.integers(0, 64, total)]
    layer = rng.integers(0, LAYERS, total)
    values = rng.standard_normal(total)
    given = {
        "run_id": ids, "repeat": np.arange(total) % repeats, "seed": 0, "model": "reference", "dtype": "float32",
        "device": "cpu", "source": "pydoc", "batch_index": rng.integers(0, BATCHES, total), "layer": layer,
        "layers": layer, "module": np.char.add("h.", layer.astype(str)), "layer_type": "attn",
        "layer_depth": np.array(["early", "mid", "late"])[layer * 3 // LAYERS], "location": location,
        "kind": "bitflip", "bit": bit, "bits": bit,
        "bit_field": np.where(bit == 31, "sign", np.where(bit > 22, "exponent", "mantissa")), "index_batch": 0,
        "index_head": rng.integers(0, HEADS, total), "index_row": rng.integers(0, 128, total),
        "index_col": rng.integers(0, 64, total), "masked_position": False, "effective": True, "value_before": values,
        "value_after": -values, "bits_before": [f"0x{number:08x}" for number in rng.integers(0, 2**32, total)],
        "bits_after": [f"0x{number:08x}" for number in rng.integers(0, 2**32, total)], "fault_id": ids[::-1],
        "sampling_weight": 1.0, "scope": "full", "baseline_loss": 1.1 + 0.1 * values,
        "injected_loss": 1.1 + 0.2 * values, "loss_diff": 0.1 * values**3, "relative_change": np.abs(values),
        "kl_mean": values**2, "top1_changed": rng.integers(0, 3, total), "nonfinite": outcome == "nonfinite",
        "outcome": outcome, "violation_detected": texts != "", "detectors": texts,
        "num_violations": rng.integers(0, 9, total), "oracle_detected": False, "oracle_detectors": "",
        "unproved_detectors": "", "epsilon_margin": np.abs(values) * 1e-2, "epsilon": np.abs(values),
        "epsilon_lower": np.abs(values) * 0.9, "epsilon_upper": np.abs(values) * 1.2,
        "baseline_seconds": rng.gamma(9, 1e-3, total), "injection_seconds": rng.gamma(4, 1e-3, total),
        "bounds_seconds": rng.gamma(4, 2e-4, total), "detection_seconds": rng.gamma(4, 2e-4, total),
        "total_seconds": rng.gamma(9, 1e-3, total), "peak_memory_mb": 512.5, "attention_flops": 33554432,
        "bounds_flops": 334848, "execution": "rows", "hits": 1,
    }  # fmt: skip
    empty = {name: None for name in columns(ExperimentResult) if name not in given}
    frame = pd.DataFrame({**given, **empty})[columns(ExperimentResult)]
    truth = frame.select_dtypes(bool).columns
    return frame.assign(**{name: np.where(frame[name], "True", "False") for name in truth})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    folder = CampaignFolder(arguments.folder)
    # In a process of its own: what it takes would count as memory of the children that this one starts.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        total = pool.submit(make_campaign, folder, arguments.runs).result()
    print(f"{total:,} runs, runs.csv {folder.file('runs.csv').stat().st_size / 1e6:.0f} MB")
    start = time.perf_counter()
    report = subprocess.Popen([sys.executable, str(ROOT / "run_sweep.py"), "report", str(folder.path)])
    _, status, used = os.wait4(report.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the report ended with status {os.waitstatus_to_exitcode(status)}")
    peak, processor = used.ru_maxrss / 1024, used.ru_utime + used.ru_stime
    page = folder.file("report.html").stat().st_size / 1e6
    print(f"{seconds:.1f} s ({processor:.1f} s of processor time), peak {peak:.0f} MB, report.html {page:.1f} MB")


if __name__ == "__main__":
    main()
