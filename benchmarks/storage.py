"""What a large campaign takes to plan, to look at, to merge, to go on with and to export, without computing any run.

    python -m benchmarks.storage                                    # 100,000 runs in 256 shards, 10 detections each
    python -m benchmarks.storage --rows 1000000 --detections 0

The shards are made up: rows of all columns, of the widths that rows of real campaigns have, done by one worker in 256
in any order within windows. Each figure is that of a process of its own: seconds of the operation, and the peak of the
resident set with all libraries in it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.merge import merge_campaign
from experiments.campaign.shard_files import ShardFiles
from experiments.command_line import main as run_sweep
from experiments.config import ExperimentConfig
from experiments.plan.plan import make_plan
from experiments.plan.shards import Shard, shard_of
from experiments.tables.csv_file import write_lines
from experiments.tables.row_lines import encoded
from experiments.tables.schema import CleanRow, DetectionRow, ExperimentResult, cells, columns
from monitoring.performance.memory import ResidentPeak, resident_bytes

LOCATIONS = ["q", "k", "v", "scores", "weights", "out"]
BITS = list(range(32))
WINDOW = 1024
"""Runs of a shard come in any order within so many."""


def campaign_config(rows: int, parent: str) -> ExperimentConfig:
    """Return a grid of all locations and bits with at least so many runs."""
    repeats = -(-rows // (len(LOCATIONS) * len(BITS)))
    sweep = {"fault.location": LOCATIONS, "fault.bit": BITS}
    return ExperimentConfig(name="storage", output_dir=parent, num_runs=repeats, sweep=sweep)


def make_campaign(rows: int, shards: int, detections: int, parent: str) -> CampaignFolder:
    """Write a campaign of at least ``rows`` finished runs; ``detections`` rows each, in as many shards as asked."""
    config = campaign_config(rows, parent)
    plan, folder, chance = make_plan(config), CampaignFolder.of(config), random.Random(0)
    folder.begin(config, plan)
    # The rest of a row, behind its id.
    results = [encoded([cells(_result(chance))])[16:] for _ in range(64)]
    verdicts = [[encoded([cells(_detection(chance, d))])[16:] for d in range(detections)] for _ in range(64)]
    for number in range(1, shards + 1):
        runs = shard_of(plan, Shard(number, shards))
        for start in range(0, len(runs), WINDOW):
            runs[start : start + WINDOW] = chance.sample(window := runs[start : start + WINDOW], len(window))
        ids = [run.run_id.encode() for run in runs]
        stem = folder.shards / Shard(number, shards).file_name
        write_lines(stem.with_suffix(".csv"), columns(ExperimentResult), (i + chance.choice(results) for i in ids))
        found = (run_id + rest for run_id in ids for rest in chance.choice(verdicts))
        write_lines(stem.with_suffix(".detections.csv"), columns(DetectionRow), found)
        clean = [_clean(detector, layer) for detector in range(detections) for layer in range(12)]
        write_lines(stem.with_suffix(".clean.csv"), columns(CleanRow), [encoded(map(cells, clean))])
    return folder


def _result(chance: random.Random) -> ExperimentResult:
    bit, loss, change = chance.randrange(32), 3 + chance.random(), chance.random() / 100
    seconds = {
        f"{name}_seconds": chance.random() / 100
        for name in ("baseline", "injection", "bounds", "detection", "total")
    }  # fmt: skip
    return ExperimentResult(
        run_id="0" * 16, repeat=chance.randrange(100), seed=0, model="reference", dtype="float32", device="cpu",
        source="pydoc", batch_index=chance.randrange(16), layer=3, layers="3", module="transformer.h.3.attn",
        layer_type="attn", layer_depth="mid", location="scores", kind="bitflip", bit=bit, bits=str(bit),
        bit_field="exponent", index_batch=0, index_head=3, index_row=chance.randrange(128), index_col=17,
        masked_position=False, effective=True, value_before=chance.random(), value_after=chance.random(),
        bits_before="0x3f12ab43", bits_after="0x3f12ab42", fault_id=f"{chance.getrandbits(64):016x}",
        sampling_weight=1.0, scope="full", baseline_loss=loss, injected_loss=loss + change, loss_diff=change,
        relative_change=change, kl_mean=change / 7, top1_changed=0, nonfinite=False, outcome="benign",
        violation_detected=True, detectors="S_total;W_sum", num_violations=2, oracle_detected=False,
        oracle_detectors="", unproved_detectors="", epsilon_margin=change, epsilon=change, epsilon_lower=-change,
        epsilon_upper=2 * change, **seconds, peak_memory_mb=1638.25, attention_flops=1_234_567_890,
        bounds_flops=1_234_567, execution="rows", hits=1,
    )  # fmt: skip


def _detection(chance: random.Random, detector: int) -> DetectionRow:
    reason = None if detector % 4 else "the projections of this layer are not recognised, so nothing is known of them"
    return DetectionRow(
        run_id="0" * 16, detector=f"detector_{detector}", online=True, proved=True, layer=3,
        module="transformer.h.3.attn", applicable=reason is None, reason=reason, rows_checked=1536,
        violations=chance.randrange(2), nonfinite=0, largest_ratio=chance.random(),
    )  # fmt: skip


def _clean(detector: int, layer: int) -> CleanRow:
    return CleanRow(
        baseline="0" * 16, detector=f"detector_{detector}", tolerance=0.0, layer=layer, proved=True, applicable=True,
        rows_checked=1536, violations=0, largest_ratio=0.25, module=f"transformer.h.{layer}.attn",
    )  # fmt: skip


def _dry_run(folder: CampaignFolder) -> None:
    run_sweep(["--config", str(folder.config_file), "--dry-run"])


def _go_on(folder: CampaignFolder) -> None:
    plan = make_plan(folder.config())
    finished = folder.finished_runs()
    with ShardFiles(folder, Shard(1, 1)):
        todo = [run for run in shard_of(plan, Shard()) if run.run_id not in finished]
    if todo:
        raise RuntimeError(f"{len(todo)} runs are not done")


def _export(table: str) -> Callable[[CampaignFolder], None]:
    return lambda folder: _checked(run_sweep(["export", str(folder.path), "--table", table]))


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"exit status {status}")


PARTS: dict[str, tuple[str, Callable[[CampaignFolder], Any]]] = {
    "plan": ("make the plan", lambda folder: make_plan(folder.config())),
    "dry-run": ("`--dry-run`", _dry_run),
    "begin": ("write `plan.csv`", lambda folder: _begin_again(folder)),
    "status": ("`status`", lambda folder: _checked(run_sweep(["status", str(folder.path)]))),
    "merge": ("merge", merge_campaign),
    "resume": ("go on with nothing left to do", _go_on),
    "export": ("`export` of the runs", _export("runs")),
    "export-detections": ("`export --table detections`", _export("detections")),
}
"""What is measured, in this order: a name, its meaning, and what is called."""


def _begin_again(folder: CampaignFolder) -> None:
    config = folder.config()
    with tempfile.TemporaryDirectory() as other:
        CampaignFolder(Path(other) / "again").begin(config, make_plan(config))


def measure(part: str, folder: Path) -> dict[str, Any]:
    """Return the seconds of a part and the peak of the resident set in bytes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.storage", "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _part(name: str, folder: Path) -> dict[str, Any]:
    campaign, libraries = CampaignFolder(folder), resident_bytes()
    with ResidentPeak() as peak, contextlib.redirect_stdout(io.StringIO()):
        start, processor = time.perf_counter(), time.process_time()
        PARTS[name][1](campaign)
        seconds, busy = time.perf_counter() - start, time.process_time() - processor
    return {"seconds": seconds, "cpu_seconds": busy, "peak_bytes": peak.peak_bytes, "libraries_bytes": libraries}


def _sizes(folder: CampaignFolder) -> Iterator[tuple[str, float]]:
    for suffix in ("", ".detections"):
        yield suffix or "runs", sum(path.stat().st_size for path in folder.shard_files(suffix)) / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the shards, measure and print."""
    parser = argparse.ArgumentParser(description="Planning, merging and exporting large campaigns.")
    parser.add_argument("--rows", type=int, default=100_000, help="runs, at least (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--detections", type=int, default=10, help="rows of a run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="192 runs in 4 shards: seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.part:
        print(json.dumps(_part(chosen.part, chosen.folder)))
        return
    rows, shards = (192, 4) if chosen.quick else (chosen.rows, chosen.shards)
    with tempfile.TemporaryDirectory() as parent:
        folder = make_campaign(rows, shards, chosen.detections, parent)
        sizes = dict(_sizes(folder))
        found = {part: measure(part, folder.path) for part in PARTS}
    if chosen.json:
        print(json.dumps({"rows": rows, "shards": shards, "mebibytes": sizes, **found}))
        return
    print(f"{rows} runs in {shards} shards, {sizes['runs']:.0f} MiB; {sizes['.detections']:.0f} MiB of detections")
    print("| | s | s of the processor | peak, MiB | of that libraries |\n|---|---|---|---|---|")
    for part, (meaning, _) in PARTS.items():
        said = found[part]
        memory = " | ".join(f"{said[key] / 2**20:.0f}" for key in ("peak_bytes", "libraries_bytes"))
        print(f"| {meaning} | {said['seconds']:.1f} | {said['cpu_seconds']:.1f} | {memory} |")


if __name__ == "__main__":
    main()
